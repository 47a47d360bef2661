"""Attacks on one deployment: refused, logged, and without effect on the server."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import ssl
import subprocess
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
from loopback import HOST, Deployment, deployment, free_ports, make_keys, needs_haproxy
from tiny_app import expected_sums, write_tiny_app

from fedgan.cli.approve import bundle_hash

pytestmark = needs_haproxy

HOSPITALS = ("hospital-1", "hospital-2")
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two hospitals, which run one app alone, and whose requests are recorded."""
    folder = tmp_path_factory.mktemp("security")
    for name in ("deployment", "recording"):
        (folder / name).mkdir()
    approved, app = folder / "approved.txt", write_tiny_app(folder / "app")
    approved.write_text(f"{bundle_hash(app)}  the tiny app\n")
    with deployment(
        folder / "deployment",
        app,
        HOSPITALS,
        approved=approved,
        recording=folder / "recording",
        outsiders=("stranger", "leaver"),
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(federation: Deployment) -> Iterator[None]:
    """After each test, proxy and SuperLink are healthy and the hospitals online."""
    yield
    assert federation.health("proxy") == 200, federation.tails("proxy", "superlink")
    assert federation.online() >= set(HOSPITALS), federation.tails()


class Attacker:
    """A client of the proxy, or of the SuperLink itself, with the key of `key`."""

    def __init__(self, federation: Deployment, key: str, to: str = "proxy") -> None:
        self.port, self.ca = federation.ports[to], federation.keys / "ca.crt"
        private = (federation.keys / "hospitals" / key / "node.key").read_bytes()
        loaded = serialization.load_ssh_private_key(private, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self.key = loaded
        pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        self.public_key = loaded.public_key().public_bytes(pem, form)

    def signed(self, age: float = 0) -> dict[str, str]:
        """Headers that a SuperNode signed `age` seconds ago."""
        timestamp = (
            datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
        ).isoformat()
        signature = self.key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        encoded = {"flwr-public-key": self.public_key, "flwr-signature": signature}
        return {"flwr-timestamp": timestamp} | {
            name: base64.b64encode(value).decode() for name, value in encoded.items()
        }

    def post(
        self,
        path: str,
        message: Any = None,
        headers: dict[str, str] | None = None,
        content: Any = None,
    ) -> httpx.Response:
        """POST a protobuf message, or raw content."""
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
        return self.post(
            "/v1/fleet/activate-node",
            ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=30),
        )

    def pull(self, node_id: int, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.post(
            "/v1/fleet/pull-messages", PullMessagesRequest(node=Node(node_id=node_id)), headers
        )


def wait_logged(federation: Deployment, *texts: str) -> None:
    """Wait for a line of the proxy's log that contains all texts; it follows the answer."""

    def logged() -> bool:
        lines = federation.log("proxy").read_text().splitlines()
        return any(all(text in line for text in texts) for line in lines)

    federation.wait(f"a line with {texts} in the log of proxy", logged, 30, "proxy")


def recorded(federation: Deployment, path: str) -> list[dict[str, Any]]:
    """The recorded requests of a path, oldest first."""
    found = sorted((federation.folder.parent / "recording").glob("[0-9]*.json"))
    requests = [json.loads(file.read_text()) for file in found]
    return [request for request in requests if request["path"] == path]


def test_supernode_with_an_unregistered_key_ends_with_an_error(federation: Deployment) -> None:
    words = federation.node_command(
        "stranger", f"{HOST}:{federation.ports['proxy']}", free_ports(1)[0], {"partition-id": 9}
    )
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env=federation.environment_of("stranger")
    )
    assert done.returncode != 0
    assert "Failed to activate SuperNode" in done.stdout + done.stderr, done.stdout + done.stderr
    wait_logged(federation, "path=/v1/fleet/activate-node status=412 ", "answered 412")


def test_unregistered_key_is_refused(federation: Deployment) -> None:
    stranger = Attacker(federation, "stranger")
    assert stranger.activate().status_code >= 400
    answer = stranger.pull(federation.node_ids["hospital-1"])
    assert answer.status_code == 401
    wait_logged(federation, "path=/v1/fleet/pull-messages status=401 ", "answered 401")


def test_revoked_key_is_refused(federation: Deployment) -> None:
    federation.register("leaver")
    leaver, node_id = Attacker(federation, "leaver"), federation.node_ids["leaver"]
    assert leaver.activate().status_code == 200
    assert leaver.pull(node_id).status_code == 200
    federation.unregister("leaver")
    assert leaver.pull(node_id).status_code == 401
    assert leaver.activate().status_code >= 400
    wait_logged(federation, "path=/v1/fleet/activate-node status=412 ", "answered 412")


def test_hospital_cannot_act_as_another(federation: Deployment) -> None:
    assert (
        Attacker(federation, "hospital-1").pull(federation.node_ids["hospital-2"]).status_code
        == 401
    )


def test_wrong_clock_is_refused_and_logged(federation: Deployment) -> None:
    hospital = Attacker(federation, "hospital-1")
    for age in (1000, -100):
        headers = hospital.signed(age)
        node = federation.node_ids["hospital-1"]
        assert hospital.pull(node, headers).status_code == 401
        minute = headers["flwr-timestamp"][:16]
        wait_logged(federation, f'reason="answered 401, signed {minute}"')


def test_plain_http_is_refused(federation: Deployment) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{HOST}:{federation.ports['proxy']}/health", timeout=10)
    federation.wait_log("proxy", "http request")


def test_client_with_another_authority_does_not_connect(
    federation: Deployment, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=make_keys(tmp_path / "keys") / "ca.crt")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{HOST}:{federation.ports['proxy']}/health", verify=context, timeout=10)
    federation.wait_log("proxy", "SSL handshake failure")


def test_hospital_cannot_reach_the_control_api(federation: Deployment) -> None:
    hospital = Attacker(federation, "hospital-1")
    for path in (
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
    ):
        assert hospital.post(path, content=b"").status_code == 403
        wait_logged(federation, f"path={path} status=403 ", "path not allowed")
    out = federation.flwr("ls", superlink="through-proxy", fails=True)
    assert "path not allowed" in out or "403" in out, out
    wait_logged(federation, "path=/v1/control/list-runs status=403 ", "path not allowed")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet%2f..%2fcontrol/list-nodes",
        "//v1/control/list-nodes",
    ],
)
def test_path_tricks_do_not_reach_the_control_api(federation: Deployment, path: str) -> None:
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
        url = f"https://{HOST}:{federation.ports['proxy']}{path}"
        done = subprocess.run(
            [*words, "--write-out", "%{http_code}", url], capture_output=True, text=True, timeout=30
        )
        assert done.stdout.endswith("403"), done
    wait_logged(federation, f"path={path} status=403")


def test_large_body_is_refused_with_and_without_a_length(federation: Deployment) -> None:
    hospital = Attacker(federation, "hospital-1")
    size = 17 * 2**20
    assert hospital.post("/v1/fleet/push-object", content=b"x" * size).status_code == 413
    assert (
        hospital.post(
            "/v1/fleet/push-object", content=(b"x" * 2**20 for _ in range(17))
        ).status_code
        == 413
    )
    wait_logged(federation, "path=/v1/fleet/push-object status=413")


def test_object_names_with_paths_reach_no_files(federation: Deployment) -> None:
    hospital, node = (
        Attacker(federation, "hospital-1"),
        Node(node_id=federation.node_ids["hospital-1"]),
    )
    before = sorted(path for path in federation.folder.rglob("*") if "superlink" in path.parts)
    for name in ("../../keys/server/server.key", "/etc/passwd", "..\\x", "a\x00b"):
        pulled = hospital.post(
            "/v1/fleet/pull-object", PullObjectRequest(node=node, run_id=1, object_id=name)
        )
        pushed = hospital.post(
            "/v1/fleet/push-object",
            PushObjectRequest(node=node, run_id=1, object_id=name, object_content=b"x"),
        )
        fab = hospital.post("/v1/fleet/get-fab", GetFabRequest(node=node, run_id=1, hash_str=name))
        assert b"PRIVATE KEY" not in pulled.content + pushed.content + fab.content
        assert fab.status_code >= 400
        assert b"root:" not in pulled.content
    assert (
        sorted(path for path in federation.folder.rglob("*") if "superlink" in path.parts) == before
    )


def test_replayed_heartbeat_is_refused_by_the_proxy_alone(
    federation: Deployment,
) -> None:
    hospital, node = (
        Attacker(federation, "hospital-1"),
        Node(node_id=federation.node_ids["hospital-1"]),
    )
    inside = Attacker(federation, "hospital-1", to="superlink")
    beat, headers = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30), hospital.signed()
    assert hospital.post("/v1/fleet/send-node-heartbeat", beat, headers).status_code == 200
    assert hospital.post("/v1/fleet/send-node-heartbeat", beat, headers).status_code == 403
    # The signature covers the timestamp only, not path and body.
    assert hospital.pull(federation.node_ids["hospital-1"], headers).status_code == 403
    wait_logged(federation, "path=/v1/fleet/pull-messages status=403", "replayed")
    # Without the proxy the replay passes. If this fails, Flower refuses replays itself.
    assert inside.post("/v1/fleet/send-node-heartbeat", beat, headers).status_code == 200
    assert inside.pull(federation.node_ids["hospital-1"], headers).status_code == 200


def test_replayed_update_is_refused_and_counts_once(federation: Deployment, tmp_path: Path) -> None:
    output = tmp_path / "sums.json"
    run = federation.submit({"output": str(output), "hospitals": 2, "rounds": 2, "wait": 1.0})
    pushes = "/v1/fleet/push-messages"
    federation.wait("an update", lambda: bool(recorded(federation, pushes)), 90)
    push = recorded(federation, pushes)[0]
    body, headers = (
        base64.b64decode(push["body"]),
        {k: v for k, v in push["headers"].items() if k.startswith(("flwr-", "content-type"))},
    )
    anybody = Attacker(federation, "stranger")
    answer = anybody.post(pushes, content=body, headers=headers)
    assert answer.status_code == 403
    wait_logged(federation, f"path={pushes} status=403", "replayed")
    # Under a new signature of a hospital, the SuperLink recognizes the update by its id.
    federation.wait_log("node-1", "Sent successfully", 60)
    federation.wait_log("node-2", "Sent successfully", 60)
    for key in HOSPITALS:
        Attacker(federation, key).post(pushes, content=body)
    assert federation.wait_finished(run, 120) == "finished:completed", federation.tails()
    assert json.loads(output.read_text()) == expected_sums(hospitals=2)


def test_code_that_is_not_approved_does_not_run(federation: Deployment, tmp_path: Path) -> None:
    app, ran = write_tiny_app(tmp_path / "app"), tmp_path / "ran"
    client = app / "tiny" / "client.py"
    client.write_text(f"open({str(ran)!r}, 'w')\n{client.read_text()}")
    run = federation.submit({"output": str(tmp_path / "sums.json"), "hospitals": 2}, app)
    for number in federation.numbers:
        federation.wait_log(f"clientapp-{number}", f"code with SHA-256 {bundle_hash(app)}", 60)
        approved = f"approved is {bundle_hash(federation.app)}"
        assert approved in federation.log(f"clientapp-{number}").read_text()
    assert federation.wait_finished(run, 60) == "finished:failed"
    assert not ran.exists()


def test_proxy_log_has_no_credentials_or_bodies(federation: Deployment) -> None:
    text = federation.log("proxy").read_text()
    pulls = recorded(federation, "/v1/fleet/pull-messages")
    assert pulls
    for value in (
        pulls[-1]["headers"][name]
        for name in ("flwr-signature", "flwr-public-key", "flwr-timestamp")
    ):
        assert value not in text
    assert "BEGIN" not in text
