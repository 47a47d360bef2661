"""ClientApps of failing hospitals: `raises`, `dies`, `slow`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import RequestContext, introduce, train_round
from client.gate import OutboundGate
from client.hospital import LocalHospital, TrainRequest


def with_fault(
    fault: Callable[[RequestContext], None], round_number: int, hospital: int | None
) -> ClientApp:
    """The real ClientApp with `fault` in one round at one hospital (None: at all)."""
    app = OutboundGate()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return RequestContext(message, context).reply(introduce)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return RequestContext(message, context).reply(work)

    def work(context_: RequestContext, request: TrainRequest, local: LocalHospital) -> RecordDict:
        if request.round == round_number and hospital in (None, local.number):
            fault(context_)
        return train_round(context_, request, local)

    return app


def _raise(context_: RequestContext) -> None:
    context_.step = "training round 2"
    raise ValueError("/data/secret/patient-0017.png")


raises = with_fault(_raise, round_number=2, hospital=1)
dies = with_fault(lambda context_: os._exit(9), round_number=2, hospital=2)
slow = with_fault(lambda context_: time.sleep(4), round_number=2, hospital=None)
