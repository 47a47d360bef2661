"""ClientApps of failing hospitals: `fails`, `slow`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import RequestContext, introduce, train_round
from client.gate import OutboundGate
from client.hospital import LocalHospital, TrainRequest


def with_fault(fault: Callable[[RequestContext, int], None]) -> ClientApp:
    """The real ClientApp with `fault(context, hospital)` before the training of round 2."""
    app = OutboundGate()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return RequestContext(message, context).reply(introduce)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return RequestContext(message, context).reply(work)

    def work(context_: RequestContext, request: TrainRequest, local: LocalHospital) -> RecordDict:
        if request.round == 2:
            fault(context_, local.number)
        return train_round(context_, request, local)

    return app


def _fail(context_: RequestContext, hospital: int) -> None:
    if hospital == 1:
        context_.step = "training round 2"
        raise ValueError("/data/secret/patient-0017.png")
    if hospital == 2:
        os._exit(9)


fails = with_fault(_fail)
slow = with_fault(lambda context_, hospital: time.sleep(4))
