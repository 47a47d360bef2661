"""Who does not belong to the federation: refused, logged, and the server unharmed. One deployment for all of it."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from loopback import HOST, Deployment, deployment, free_ports, make_keys
from tiny_app import expected_sums, write_tiny_app

HOSPITALS = ("hospital-1", "hospital-2")
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two hospitals behind a filter that records what it is asked."""
    folder = tmp_path_factory.mktemp("security")
    for name in ("deployment", "recording"):
        (folder / name).mkdir()
    with deployment(
        folder / "deployment",
        write_tiny_app(folder / "app"),
        HOSPITALS,
        environment={"FEDGAN_RECORDING": str(folder / "recording")},
        filter_command=(sys.executable, "-m", "recording_filter"),
        outsiders=("stranger", "leaver"),
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(federation: Deployment) -> Iterator[None]:
    """After each test: the filter and the SuperLink are healthy, and the hospitals are online."""
    yield
    assert federation.health("filter") == 200, federation.tails("filter", "superlink")
    assert federation.online() >= set(HOSPITALS), federation.tails()


class Attacker:
    """Asks the filter (or the SuperLink itself) with whatever key it was given."""

    def __init__(self, federation: Deployment, key: str, to: str = "filter") -> None:
        self.port, self.ca = federation.ports[to], federation.keys / "ca.crt"
        private = (federation.keys / "hospitals" / key / "node.key").read_bytes()
        loaded = serialization.load_ssh_private_key(private, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self.key = loaded
        pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        self.public_key = loaded.public_key().public_bytes(pem, form)

    def signed(self, age: float = 0) -> dict[str, str]:
        """Headers as a SuperNode signs them, `age` seconds ago."""
        timestamp = (
            datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
        ).isoformat()
        signature = self.key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        encoded = {"flwr-public-key": self.public_key, "flwr-signature": signature}
        return {"flwr-timestamp": timestamp} | {
            name: base64.b64encode(value).decode() for name, value in encoded.items()
        }

    def ask(
        self,
        path: str,
        message: Any = None,
        headers: dict[str, str] | None = None,
        content: Any = None,
    ) -> httpx.Response:
        """POST a protobuf message (or raw content)."""
        body = message.SerializeToString() if content is None else content
        context = ssl.create_default_context(cafile=self.ca)
        url = f"https://{HOST}:{self.port}{path}"
        return httpx.post(
            url,
            content=body,
            headers=PROTOBUF | (headers or self.signed()),
            verify=context,
            timeout=30,
        )

    def activate(self) -> httpx.Response:
        return self.ask(
            "/v1/fleet/activate-node",
            ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=30),
        )

    def pull(self, node_id: int, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.ask(
            "/v1/fleet/pull-messages", PullMessagesRequest(node=Node(node_id=node_id)), headers
        )


def logged(federation: Deployment, *texts: str) -> bool:
    """Whether one line of the filter's log holds all texts."""
    lines = federation.log("filter").read_text().splitlines()
    return any(all(text in line for text in texts) for line in lines)


def recorded(federation: Deployment, path: str) -> list[dict[str, Any]]:
    """What the filter was asked under a path, oldest first."""
    found = sorted((federation.folder.parent / "recording").glob("[0-9]*.json"))
    return [told for file in found if (told := json.loads(file.read_text()))["path"] == path]


def test_a_supernode_whose_key_is_not_registered_ends_and_says_so(federation: Deployment) -> None:
    words = federation.node_command(
        "stranger", f"{HOST}:{federation.ports['filter']}", free_ports(1)[0], {"partition-id": 9}
    )
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env=federation.environment_of("stranger")
    )
    assert done.returncode != 0
    assert "Failed to activate SuperNode" in done.stdout + done.stderr, done.stdout + done.stderr
    assert logged(federation, "path=/v1/fleet/activate-node status=412", "key not registered")


def test_an_unregistered_key_gets_nothing(federation: Deployment) -> None:
    stranger = Attacker(federation, "stranger")
    assert stranger.activate().status_code >= 400
    answer = stranger.pull(federation.node_ids["hospital-1"])
    assert answer.status_code == 401
    assert logged(federation, "path=/v1/fleet/pull-messages status=401", "unknown or revoked key")


def test_a_revoked_key_gets_nothing_more(federation: Deployment) -> None:
    federation.register("leaver")
    leaver, node_id = Attacker(federation, "leaver"), federation.node_ids["leaver"]
    assert leaver.activate().status_code == 200
    assert leaver.pull(node_id).status_code == 200
    federation.unregister("leaver")
    assert leaver.pull(node_id).status_code == 401
    assert leaver.activate().status_code >= 400
    assert logged(federation, "path=/v1/fleet/activate-node status=412", "or revoked")


def test_a_hospital_cannot_act_as_another(federation: Deployment) -> None:
    assert (
        Attacker(federation, "hospital-1").pull(federation.node_ids["hospital-2"]).status_code
        == 401
    )


def test_a_clock_that_is_off_is_refused_and_the_log_says_by_how_much(
    federation: Deployment,
) -> None:
    hospital = Attacker(federation, "hospital-1")
    assert (
        hospital.pull(federation.node_ids["hospital-1"], hospital.signed(age=1000)).status_code
        == 401
    )
    assert logged(federation, "signed 1000 s ago, check the clock")
    assert (
        hospital.pull(federation.node_ids["hospital-1"], hospital.signed(age=-100)).status_code
        == 401
    )
    assert logged(federation, "s ahead, check the clock")


def test_plain_http_gets_no_service(federation: Deployment) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{HOST}:{federation.ports['filter']}/health", timeout=10)
    federation.wait_log("filter", "the client speaks plain HTTP")


def test_a_client_with_another_ca_does_not_connect(federation: Deployment, tmp_path: Path) -> None:
    context = ssl.create_default_context(cafile=make_keys(tmp_path / "keys", []) / "ca.crt")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{HOST}:{federation.ports['filter']}/health", verify=context, timeout=10)
    federation.wait_log("filter", "does not trust this certificate")


def test_a_hospital_does_not_reach_the_control_api(federation: Deployment) -> None:
    hospital = Attacker(federation, "hospital-1")
    for path in (
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
    ):
        assert hospital.ask(path, content=b"").status_code == 403
        assert logged(federation, "refused", f"path={path} status=403")
    said = federation.flwr("ls", superlink="through-filter", fails=True)
    assert "path not allowed" in said or "403" in said, said
    assert logged(federation, "refused", "path=/v1/control/list-runs status=403")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet%2f..%2fcontrol/list-nodes",
        "//v1/control/list-nodes",
    ],
)
def test_no_detour_leads_to_the_control_api(federation: Deployment, path: str) -> None:
    words = [
        "curl",
        "--silent",
        "--path-as-is",
        "--cacert",
        str(federation.keys / "ca.crt"),
        "--data",
        "",
    ]
    with contextlib.suppress(FileNotFoundError):
        url = f"https://{HOST}:{federation.ports['filter']}{path}"
        done = subprocess.run(
            [*words, "--write-out", "%{http_code}", url], capture_output=True, text=True, timeout=30
        )
        assert done.stdout.endswith("403"), done
    assert logged(federation, f"path={path} status=403")


def test_an_over_large_body_is_refused_announced_or_not(federation: Deployment) -> None:
    hospital = Attacker(federation, "hospital-1")
    size = 17 * 2**20
    assert hospital.ask("/v1/fleet/push-object", content=b"x" * size).status_code == 413
    assert (
        hospital.ask("/v1/fleet/push-object", content=(b"x" * 2**20 for _ in range(17))).status_code
        == 413
    )
    assert logged(federation, "path=/v1/fleet/push-object status=413")


def test_names_with_a_path_in_them_lead_nowhere(federation: Deployment) -> None:
    hospital, node = (
        Attacker(federation, "hospital-1"),
        Node(node_id=federation.node_ids["hospital-1"]),
    )
    before = sorted(path for path in federation.folder.rglob("*") if "superlink" in path.parts)
    for name in ("../../keys/server/server.key", "/etc/passwd", "..\\x", "a\x00b"):
        pulled = hospital.ask(
            "/v1/fleet/pull-object", PullObjectRequest(node=node, run_id=1, object_id=name)
        )
        pushed = hospital.ask(
            "/v1/fleet/push-object",
            PushObjectRequest(node=node, run_id=1, object_id=name, object_content=b"x"),
        )
        fab = hospital.ask("/v1/fleet/get-fab", GetFabRequest(node=node, run_id=1, hash_str=name))
        assert b"PRIVATE KEY" not in pulled.content + pushed.content + fab.content
        assert fab.status_code >= 400
        assert b"root:" not in pulled.content
    assert (
        sorted(path for path in federation.folder.rglob("*") if "superlink" in path.parts) == before
    )


def test_a_recorded_heartbeat_passes_the_filter_once_where_the_superlink_alone_takes_it_again(
    federation: Deployment,
) -> None:
    hospital, node = (
        Attacker(federation, "hospital-1"),
        Node(node_id=federation.node_ids["hospital-1"]),
    )
    inside = Attacker(federation, "hospital-1", to="superlink")
    beat, headers = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30), hospital.signed()
    assert hospital.ask("/v1/fleet/send-node-heartbeat", beat, headers).status_code == 200
    assert hospital.ask("/v1/fleet/send-node-heartbeat", beat, headers).status_code == 403
    # the signature is over the timestamp alone: neither path nor body belong to it
    assert hospital.pull(federation.node_ids["hospital-1"], headers).status_code == 403
    assert logged(federation, "path=/v1/fleet/pull-messages status=403", "replayed")
    # What the filter is there for: were this to fail, Flower would refuse replays itself.
    assert inside.ask("/v1/fleet/send-node-heartbeat", beat, headers).status_code == 200
    assert inside.pull(federation.node_ids["hospital-1"], headers).status_code == 200


def test_a_replayed_update_is_refused_and_counts_once(
    federation: Deployment, tmp_path: Path
) -> None:
    output = tmp_path / "sums.json"
    run = federation.submit({"output": str(output), "hospitals": 2, "rounds": 2, "wait": 1.0})
    pushes = "/v1/fleet/push-messages"
    federation.wait("an update", lambda: bool(recorded(federation, pushes)), 90)
    told = recorded(federation, pushes)[0]
    body, headers = (
        base64.b64decode(told["body"]),
        {k: v for k, v in told["headers"].items() if k.startswith(("flwr-", "content-type"))},
    )
    anybody = Attacker(federation, "stranger")
    answer = anybody.ask(pushes, content=body, headers=headers)
    assert answer.status_code == 403
    assert logged(federation, f"path={pushes} status=403", "replayed")
    # Under a fresh signature of its own, which each hospital can make, the SuperLink knows an update by its id.
    federation.wait_log("node-1", "Sent successfully", 60)
    federation.wait_log("node-2", "Sent successfully", 60)
    for key in HOSPITALS:
        Attacker(federation, key).ask(pushes, content=body)
    assert federation.finished(run, 120) == "finished:completed", federation.tails()
    assert json.loads(output.read_text()) == expected_sums(hospitals=2)


def test_the_log_holds_no_credentials_and_no_bodies(federation: Deployment) -> None:
    text = federation.log("filter").read_text()
    pulls = recorded(federation, "/v1/fleet/pull-messages")
    assert pulls
    for value in (
        pulls[-1]["headers"][name]
        for name in ("flwr-signature", "flwr-public-key", "flwr-timestamp")
    ):
        assert value not in text
    assert "BEGIN" not in text
