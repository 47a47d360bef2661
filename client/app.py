"""The Flower ClientApp of one hospital: thin glue round the Trainer.

Two messages: `query.hello` (who are you) and `train` (advance by so many images from this model; four of it make a round
with `federation.secure`, see client/secure.py).
What goes wrong here stays here: the traceback goes to the hospital's own log, and one line that
names the kind of failure, but no path, patient or label, travels to the server. All that leaves goes through the
gate of client/gate.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from client.allow_list import introduction
from client.error_messages import reason
from client.gate import Gate, failure
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
from client.sent import clip_update, reported_metrics
from client.wire import outgoing, received
from fedgan.config import PARTS, Settings
from fedgan.machine import peak_memory, usable_cores
from fedgan.privacy.validator import check_private
from fedgan.training.start import begin_training

app = Gate()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this hospital is: number, name, number of training images, labels and image shape."""
    return RequestContext(message, context).answer(introduce)


@app.train(mods=[mask_update, clip_update])
def train(message: Message, context: Context) -> Message:
    """Go on from the model that arrived, and answer with the model after this round's images."""
    return RequestContext(message, context).answer(train_round)


class RequestContext:
    """One message at one hospital: remembers what is being done, in case it fails."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.node = message, context.node_config
        self.doing = "reading the server's order"
        self.folder: Path | None = None
        self.round, self.known = 0, False

    def answer(
        self, work: Callable[[RequestContext, TrainRequest, LocalHospital], RecordDict]
    ) -> Message:
        """The reply of `work`, or an error reply that gives away nothing but the kind of failure."""
        try:
            request = TrainRequest.read(self.message.content.config_records["config"])
            self.round = request.round
            self.folder = log_folder(request, self.node)
            self.doing = "holding the order against its own max-epsilon"
            request = apply_epsilon_cap(request, self.node)
            self.doing = "holding the order against its own require-secure"
            check_secure(request, self.node)
            self.doing = "opening its shard"
            local = find_local_hospital(request, self.node)
            self.folder, self.doing, self.known = local.folder, "beginning its work", True
            if request.note:
                log(self.folder, f"the server says: {request.note}")
            return Message(work(self, request, local), reply_to=self.message)
        except Exception as error:  # every failure becomes a reply: an exception would carry its traceback to the server
            log_failure(self.folder, self.round, self.doing)
            who = None if self.known else self.node.get("partition-id")
            return failure(self.message, reason(error, self.doing, who))


def introduce(context_: RequestContext, request: TrainRequest, local: LocalHospital) -> RecordDict:
    """What the server has to know of this hospital: the number of its images and their shape.

    Raises `ConfigError` where real counts of labels are asked for with privacy on.
    """
    context_.doing = "introducing itself"
    if request.settings.federation.share_label_counts:
        check_private(request.settings)
    return RecordDict({"hospital": ConfigRecord(introduction(request, local))})


def own_settings(request: TrainRequest) -> Settings:
    """The scenario as this hospital trains it: its own share of a step."""
    training = dataclasses.replace(
        request.settings.training, batch_size=request.batch or request.settings.training.batch_size
    )
    return dataclasses.replace(request.settings, training=training)


def train_round(
    context_: RequestContext, request: TrainRequest, local: LocalHospital
) -> RecordDict:
    """Load the state of the round before, take over what arrived, train, save, and give out what travels.

    Where the privacy ledger ends the training, what was trained until then is given out as ever, and `exhausted` tells the
    server not to ask again.
    """
    settings = own_settings(request)
    threads = settings.federation.threads or usable_cores()
    torch.set_num_threads(threads)

    context_.doing = "preparing the training"
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
        context_.doing = f"loading its state of round {request.since}"
        trainer.load(local.state_of(request))
    else:
        context_.doing = "preparing its folder"
        local.begin(request)

    context_.doing = "taking over the server's model"
    before_round = received(context_.message, settings)
    trainer.incoming(before_round)

    context_.doing = f"training round {request.round}"
    before, progress = trainer.images_seen, Progress(local.folder, request.round, request.images)
    means = trainer.train(request.images, on_step=lambda now: progress(now.images_seen - before))

    context_.doing = f"saving its state of round {request.round}"
    trainer.save(local.state(request.round))
    local.keep_states(request)

    context_.doing = "giving out its model in the numbers of federation.wire"
    parts = [part for part in PARTS if part in settings.federation.exchange]
    arrays = outgoing(trainer.outgoing(parts), before_round, settings)
    facts: dict[str, float] = reported_metrics(settings, means, peak_memory()) | {
        "images_seen": trainer.images_seen,
        "threads": threads,
    }
    facts["round"] = request.round
    if trainer.exhausted:
        facts["exhausted"] = 1.0
    return RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord({"num_examples": len(local.hospital.train)}),
            "facts": ConfigRecord(facts),
        }
    )
