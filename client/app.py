"""The Flower ClientApp of one hospital: thin glue round the Trainer.

Two messages: `query.hello` (who are you) and `train` (advance by so many images from this model; four of it make a round
with `federation.secure`, see client/secure.py).
What goes wrong here stays here: the traceback goes to the hospital's own log, and one line that
names the kind of failure, but no path, patient or label, travels to the server. All that leaves goes through the
gate of client/outbound.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from client.allowed import introduction
from client.outbound import Gate, failure
from client.reasons import reason
from client.secure import mask_update
from client.sent import clip_update, told
from client.site import Order, Progress, Site, bound, check_secure, find_site, log, log_failure, log_folder
from client.wire import outgoing, received
from fedgan.config import PARTS, Settings
from fedgan.machine import peak_memory, usable_cores
from fedgan.privacy.validator import check_private
from fedgan.training.start import begin_training

app = Gate()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this hospital is: number, name, number of training images, labels and image shape."""
    return Visit(message, context).answer(introduce)


@app.train(mods=[mask_update, clip_update])
def train(message: Message, context: Context) -> Message:
    """Go on from the model that arrived, and answer with the model after this round's images."""
    return Visit(message, context).answer(train_round)


class Visit:
    """One message at one hospital: remembers what is being done, in case it fails."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.node = message, context.node_config
        self.doing = "reading the server's order"
        self.folder: Path | None = None
        self.round, self.known = 0, False

    def answer(self, work: Callable[[Visit, Order, Site], RecordDict]) -> Message:
        """The reply of `work`, or an error reply that gives away nothing but the kind of failure."""
        try:
            order = Order.read(self.message.content.config_records["config"])
            self.round = order.round
            self.folder = log_folder(order, self.node)
            self.doing = "holding the order against its own max-epsilon"
            order = bound(order, self.node)
            self.doing = "holding the order against its own require-secure"
            check_secure(order, self.node)
            self.doing = "opening its shard"
            site = find_site(order, self.node)
            self.folder, self.doing, self.known = site.folder, "beginning its work", True
            if order.note:
                log(self.folder, f"the server says: {order.note}")
            return Message(work(self, order, site), reply_to=self.message)
        except Exception as error:  # every failure becomes a reply: an exception would carry its traceback to the server
            log_failure(self.folder, self.round, self.doing)
            who = None if self.known else self.node.get("partition-id")
            return failure(self.message, reason(error, self.doing, who))


def introduce(visit: Visit, order: Order, site: Site) -> RecordDict:
    """What the server has to know of this hospital: the number of its images and their shape.

    Raises `ConfigError` where real counts of labels are asked for with privacy on.
    """
    visit.doing = "introducing itself"
    if order.settings.federation.share_label_counts:
        check_private(order.settings)
    return RecordDict({"hospital": ConfigRecord(introduction(order, site))})


def own_settings(order: Order) -> Settings:
    """The scenario as this hospital trains it: its own share of a step."""
    training = dataclasses.replace(order.settings.training, batch_size=order.batch or order.settings.training.batch_size)
    return dataclasses.replace(order.settings, training=training)


def train_round(visit: Visit, order: Order, site: Site) -> RecordDict:
    """Load the state of the round before, take over what arrived, train, save, and give out what travels.

    Where the privacy ledger ends the training, what was trained until then is given out as ever, and `exhausted` tells the
    server not to ask again.
    """
    settings = own_settings(order)
    threads = settings.federation.threads or usable_cores()
    torch.set_num_threads(threads)

    visit.doing = "preparing the training"
    trainer = begin_training(
        settings,
        site.hospital.train,
        stream=site.number,
        planned_images=order.planned,
        ledgers=[site.ledger],
        run=order.experiment,
        least_noise=order.least_noise,
    )
    if order.since:
        visit.doing = f"loading its state of round {order.since}"
        trainer.load(site.state_of(order))
    else:
        visit.doing = "preparing its folder"
        site.begin(order)

    visit.doing = "taking over the server's model"
    before_round = received(visit.message, settings)
    trainer.incoming(before_round)

    visit.doing = f"training round {order.round}"
    before, progress = trainer.images_seen, Progress(site.folder, order.round, order.images)
    means = trainer.train(order.images, on_step=lambda now: progress(now.images_seen - before))

    visit.doing = f"saving its state of round {order.round}"
    trainer.save(site.state(order.round))
    site.keep_states(order)

    visit.doing = "giving out its model in the numbers of federation.wire"
    parts = [part for part in PARTS if part in settings.federation.exchange]
    arrays = outgoing(trainer.outgoing(parts), before_round, settings)
    facts: dict[str, float] = told(settings, means, peak_memory()) | {"images_seen": trainer.images_seen, "threads": threads}
    facts["round"] = order.round
    if trainer.exhausted:
        facts["exhausted"] = 1.0
    return RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord({"num_examples": len(site.hospital.train)}),
            "facts": ConfigRecord(facts),
        }
    )
