"""ClientApps of hospitals that fail, for the federation's tests: `raises`, `dies`, `slow`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import Visit, introduce, train_round
from client.outbound import Gate
from client.site import Order, Site


def with_fault(fault: Callable[[Visit], None], round_number: int, hospital: int | None) -> ClientApp:
    """The real ClientApp, but `fault` happens in one round at one hospital (None: at each)."""
    app = Gate()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return Visit(message, context).answer(introduce)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Visit(message, context).answer(work)

    def work(visit: Visit, order: Order, site: Site) -> RecordDict:
        if order.round == round_number and hospital in (None, site.number):
            fault(visit)
        return train_round(visit, order, site)

    return app


def _raise(visit: Visit) -> None:
    visit.doing = "training round 2"
    raise ValueError("/data/secret/patient-0017.png")


raises = with_fault(_raise, round_number=2, hospital=1)
dies = with_fault(lambda visit: os._exit(9), round_number=2, hospital=2)
slow = with_fault(lambda visit: time.sleep(4), round_number=2, hospital=None)
