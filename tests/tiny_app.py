"""A Flower app without torch, for deployment tests: hospitals add their number to an array."""

from __future__ import annotations

from pathlib import Path

PYPROJECT = """
[project]
name = "tiny"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "fedgan"
[tool.flwr.app.components]
serverapp = "tiny.server:app"
clientapp = "tiny.client:app"
[tool.flwr.app.config]
rounds = 2
hospitals = 3
size = 1000
wait = 0.0
output = ""
"""

CLIENT = """
import time
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    time.sleep(float(message.content["config"]["wait"]))
    array = message.content["model"]["x"].numpy() + 1 + int(context.node_config["partition-id"])
    return Message(RecordDict({"model": ArrayRecord({"x": Array(array)})}), reply_to=message)
"""

SERVER = """
import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    x, sums, end = np.zeros(config["size"], np.float32), [], time.monotonic() + 60
    while len(nodes := sorted(grid.get_node_ids())) < config["hospitals"]:
        if time.monotonic() > end:
            raise RuntimeError(f"only {len(nodes)} nodes")
        time.sleep(0.5)
    for _ in range(config["rounds"]):
        wait = ConfigRecord({"wait": config["wait"]})
        content = RecordDict({"model": ArrayRecord({"x": Array(x)}), "config": wait})
        requests = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
        received = grid.send_and_receive(requests, timeout=90)
        replies = [reply for reply in received if not reply.has_error()]
        if len(replies) < len(nodes):
            raise RuntimeError(f"{len(replies)} of {len(nodes)} replied")
        arrays = [reply.content["model"]["x"].numpy() for reply in replies]
        x = np.sum(arrays, axis=0, dtype=np.float32)
        sums.append(float(x[0]))
    with open(config["output"], "w") as file:
        json.dump(sums, file)
"""


def write_tiny_app(folder: Path) -> Path:
    """Write the app to a folder; its ServerApp writes x[0] of each round to the file `output`."""
    (folder / "tiny").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    for name, text in (("__init__", ""), ("client", CLIENT), ("server", SERVER)):
        (folder / "tiny" / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def expected_sums(hospitals: int = 3, rounds: int = 2) -> list[float]:
    """Expected content of that file when every hospital takes part in every round."""
    x, sums = 0.0, []
    for _ in range(rounds):
        x = sum(x + 1 + number for number in range(hospitals))
        sums.append(x)
    return sums
