"""The Flower ClientApp of one hospital: thin glue around the Trainer.

Two messages: `query.hello` (describe the hospital) and `train` (train this model on so many images;
with `federation.secure` a round is four of them, see client/secure.py). The traceback of a failure
goes to the hospital's own client.log; the server receives one line with the kind of failure and no
path, patient or label. Every reply passes the gate of client/gate.py.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from client.allow_list import introduction
from client.gate import Admission, OutboundGate
from client.hospital import (
    LocalHospital,
    Progress,
    TrainRequest,
    log,
)
from client.policy import apply_policy_to_step, apply_state_quota, read_policy
from client.secure import mask_update
from client.wire import received_model, update_record
from fedgan.config import PARTS, Settings
from fedgan.errors import CheckpointError, ConfigError
from fedgan.exchange.round_metrics import reported_metrics
from fedgan.machine import peak_memory, usable_cores
from fedgan.privacy.register import check_no_earlier_ledger, ledger_of
from fedgan.privacy.validator import check_private
from fedgan.redact import printable
from fedgan.training.checkpoint import ForeignStateError
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer

app = OutboundGate()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Describe this hospital: number, name, number of training images, labels and image shape."""
    return RequestContext(message, context).reply(introduce)


@app.train(mods=[mask_update])
def train(message: Message, context: Context) -> Message:
    """Train the received model on this round's images and reply with the update."""
    return RequestContext(message, context).reply(train_round)


class RequestContext(Admission):
    """One admitted request at one hospital."""

    def reply(
        self, work: Callable[[RequestContext, TrainRequest, LocalHospital], RecordDict]
    ) -> Message:
        """The reply of `work`, or an error reply with only the kind of failure and the step."""
        try:
            request, local = self.admit()
            self.step = "starting the work"
            if request.note:
                log(local.folder, f"note of the server: {printable(request.note)}")
            return Message(work(self, request, local), reply_to=self.message)
        except Exception as error:  # an exception would carry its traceback to the server
            return self.error_reply(error)


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
    `exhausted`, and the server sends no further request. Waits while another process trains this
    hospital, as long as the request is valid.
    """
    context_.step = "waiting for its other process"
    with local.locked(request, context_.message.metadata.ttl):
        context_.step = "comparing the request with its pinned settings"
        assert context_.asked
        local.check_pins(context_.asked, True)  # again: two first requests may have come at once
        context_.step = "comparing the request with its states"
        local.check_is_newest(request)
        return _train_locked(context_, request, local)


def _train_locked(
    context_: RequestContext, request: TrainRequest, local: LocalHospital
) -> RecordDict:
    settings, policy = local_settings(request), read_policy(context_.node)
    if (quota := policy.get("state-quota")) and (state_dir := context_.node.get("state-dir")):
        context_.step = "applying its state-quota"
        apply_state_quota(Path(str(state_dir)), local.folder, quota)
    threads = settings.federation.threads or usable_cores()
    torch.set_num_threads(threads)

    def begin() -> Trainer:
        context_.step = "preparing the training"
        if settings.privacy.on and (state_dir := context_.node.get("state-dir")):
            check_no_earlier_ledger(Path(str(state_dir)))
        return begin_training(
            settings,
            local.hospital.train,
            stream=local.number,
            planned_images=request.planned,
            ledger=ledger_of(settings, [local.hospital]),
            run=request.experiment,
            least_noise=request.least_noise,
        )

    trainer, continued_from = continue_training(begin, context_, request, local)
    if trainer.private is not None:
        apply_policy_to_step(trainer.private, policy, context_.at)

    if settings.privacy.on and trainer.images_seen + request.images > request.planned:
        context_.step = "comparing the request with its pinned settings"
        raise ConfigError(
            f"the noise of this run was chosen for {request.planned} images, and with this round "
            f"they would be {trainer.images_seen + request.images}: begin a new run"
        )

    context_.step = "loading the server's model"
    before_round = received_model(context_.message, settings)
    trainer.load_parameters(before_round)

    context_.step = f"training round {request.round}"
    before, progress = trainer.images_seen, Progress(local.folder, request.round, request.images)
    begun = time.monotonic()

    def on_step(now: Trainer) -> None:
        progress(now.images_seen - before)
        if time.monotonic() - begun > policy.get("max-seconds", math.inf):
            context_.step = "applying its max-seconds"
            raise ConfigError(
                f"this node's config has max-seconds = {policy['max-seconds']:g}, and after "
                f"{now.images_seen - before} of {request.images} images they are over"
            )

    means = trainer.train(request.images, on_step=on_step)

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
    if continued_from != request.since:
        facts["continued_from"] = float(continued_from)
    return RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord({"num_examples": len(local.hospital.train)}),
            "facts": ConfigRecord(facts),
        }
    )


def continue_training(
    begin: Callable[[], Trainer],
    context_: RequestContext,
    request: TrainRequest,
    local: LocalHospital,
) -> tuple[Trainer, int]:
    """A Trainer with the state of round `request.since`, and the round whose state it has.

    Where that state is lost, with the newest older one that is whole, or with none (round 0): as a
    hospital that joins late, it then starts from the server's model, and the moments of its
    optimisers, ADA's p, its counters and the parts that do not travel begin anew. The privacy
    ledger is not a part of the state and counts on. Raises `CheckpointError` for a state of other
    images or another device, and for a lost one with `federation.control_variates`: the corrections
    of all hospitals sum to zero, and this one's cannot be computed again.
    """
    trainer = begin()
    if not request.since:
        return trainer, 0
    older = [number for number in local.states() if number < request.since]
    for number in [request.since, *reversed(older)]:
        context_.step = f"loading its state of round {number}"
        try:
            trainer.load(local.state(number))
        except ForeignStateError:
            raise
        except (CheckpointError, LookupError, TypeError, ValueError) as error:
            if request.settings.federation.control_variates:
                raise
            log(local.folder, f"its state of round {number} is lost: {error}")
            trainer = begin()  # the failed load may have changed a part
            continue
        if number != request.since:
            log(local.folder, f"round {request.round} continues from its state of round {number}")
        return trainer, number
    log(local.folder, f"round {request.round} starts anew from the server's model")
    return trainer, 0
