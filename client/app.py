"""The Flower ClientApp of one hospital: thin glue around the Trainer.

Two messages: `query.hello` (describe the hospital) and `train` (train this model on so many images;
with `federation.secure` a round is four of them, see client/secure.py). The traceback of a failure
goes to the hospital's own client.log; the server receives one line with the kind of failure and no
path, patient or label. Every reply passes the gate of client/gate.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from client.allow_list import introduction
from client.gate import OutboundGate, failure
from client.hospital import (
    LocalHospital,
    Progress,
    TrainRequest,
    apply_epsilon_cap,
    check_secure,
    find_local_hospital,
    log,
    log_failure,
    log_folder,
)
from client.secure import mask_update
from client.wire import clip_update, received_model, update_record
from fedgan.config import PARTS, Settings
from fedgan.exchange.error_messages import reason
from fedgan.exchange.round_metrics import reported_metrics
from fedgan.machine import peak_memory, usable_cores
from fedgan.privacy.validator import check_private
from fedgan.training.start import begin_training

app = OutboundGate()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Describe this hospital: number, name, number of training images, labels and image shape."""
    return RequestContext(message, context).reply(introduce)


@app.train(mods=[mask_update, clip_update])
def train(message: Message, context: Context) -> Message:
    """Train the received model on this round's images and reply with the update."""
    return RequestContext(message, context).reply(train_round)


class RequestContext:
    """One request at one hospital; `step` is the current step, for the report of a failure."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.node = message, context.node_config
        self.step = "reading the request"
        self.folder: Path | None = None
        self.round, self.is_named = 0, False

    def reply(
        self, work: Callable[[RequestContext, TrainRequest, LocalHospital], RecordDict]
    ) -> Message:
        """The reply of `work`, or an error reply with only the kind of failure and the step."""
        try:
            request = TrainRequest.read(self.message.content.config_records["config"])
            self.round = request.round
            self.folder = log_folder(request, self.node)
            self.step = "applying its max-epsilon"
            request = apply_epsilon_cap(request, self.node)
            self.step = "applying its require-secure"
            check_secure(request, self.node)
            self.step = "opening its shard"
            local = find_local_hospital(request, self.node)
            self.folder, self.step, self.is_named = local.folder, "starting the work", True
            if request.note:
                log(self.folder, f"note of the server: {request.note}")
            return Message(work(self, request, local), reply_to=self.message)
        except Exception as error:  # an exception would carry its traceback to the server
            log_failure(self.folder, self.round, self.step)
            partition_id = None if self.is_named else self.node.get("partition-id")
            return failure(self.message, reason(error, self.step, partition_id))


def introduce(context_: RequestContext, request: TrainRequest, local: LocalHospital) -> RecordDict:
    """The hospital's introduction: number of images, labels, image shape.

    Raises `ConfigError` where real label counts are requested with privacy.
    """
    context_.step = "describing its data"
    if request.settings.federation.share_label_counts:
        check_private(request.settings)
    return RecordDict({"hospital": ConfigRecord(introduction(request, local))})


def local_settings(request: TrainRequest) -> Settings:
    """The settings with this hospital's share of a batch."""
    training = dataclasses.replace(
        request.settings.training, batch_size=request.batch or request.settings.training.batch_size
    )
    return dataclasses.replace(request.settings, training=training)


def train_round(
    context_: RequestContext, request: TrainRequest, local: LocalHospital
) -> RecordDict:
    """Load the previous state, load the server's model, train, save, and return the update.

    Where the privacy ledger stops the training, the update up to that point is returned with
    `exhausted`, and the server sends no further request.
    """
    settings = local_settings(request)
    threads = settings.federation.threads or usable_cores()
    torch.set_num_threads(threads)

    context_.step = "preparing the training"
    trainer = begin_training(
        settings,
        local.hospital.train,
        stream=local.number,
        planned_images=request.planned,
        ledgers=[local.ledger],
        run=request.experiment,
        least_noise=request.least_noise,
    )
    if request.since:
        context_.step = f"loading its state of round {request.since}"
        trainer.load(local.state_of(request))
    else:
        context_.step = "preparing its folder"
        local.prepare_folder(request)

    context_.step = "loading the server's model"
    before_round = received_model(context_.message, settings)
    trainer.load_parameters(before_round)

    context_.step = f"training round {request.round}"
    before, progress = trainer.images_seen, Progress(local.folder, request.round, request.images)
    means = trainer.train(request.images, on_step=lambda now: progress(now.images_seen - before))

    context_.step = f"saving its state of round {request.round}"
    trainer.save(local.state(request.round))
    local.remove_old_states(request)

    context_.step = "encoding its update for federation.wire"
    parts = [part for part in PARTS if part in settings.federation.exchange]
    arrays = update_record(trainer.get_parameters(parts), before_round, settings)
    facts = reported_metrics(settings, {**means, "peak_memory_bytes": peak_memory()})
    facts |= {"images_seen": trainer.images_seen, "threads": threads, "round": request.round}
    if trainer.exhausted:
        facts["exhausted"] = 1.0
    return RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord({"num_examples": len(local.hospital.train)}),
            "facts": ConfigRecord(facts),
        }
    )
