"""Registration: the SuperLink's keys are synchronised with the registration list."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedgan.deployment.certificates import now
from fedgan.deployment.key_folder import KeyFolder
from fedgan.errors import ConfigError
from server.operator import register


@dataclass
class SuperLink:
    """The control API of a SuperLink; like Flower it accepts no key twice, even after removal."""

    nodes: list[SimpleNamespace] = field(default_factory=list)

    def ListNodes(self, request: Any) -> SimpleNamespace:
        return SimpleNamespace(nodes_info=self.nodes)

    def RegisterNode(self, request: Any) -> None:
        assert request.public_key not in [node.public_key for node in self.nodes], (
            "Public key already in use"
        )
        number = len(self.nodes) + 1
        self.nodes.append(
            SimpleNamespace(
                public_key=request.public_key,
                node_id=number,
                name=request.name,
                status="registered",
            )
        )

    def UnregisterNode(self, request: Any) -> None:
        (node,) = (
            node
            for node in self.nodes
            if node.node_id == request.node_id and node.status != "unregistered"
        )
        node.status = "unregistered"

    @property
    def admitted(self) -> list[str]:
        return [node.name for node in self.nodes if node.status != "unregistered"]


@pytest.fixture
def keys(tmp_path: Path) -> KeyFolder:
    return KeyFolder.create(tmp_path / "keys", ["north", "south"], [], 365, now())


def test_every_key_is_registered_once_under_its_hospital_name(keys: KeyFolder) -> None:
    superlink = SuperLink()
    assert register.apply_changes(keys, superlink) == ["registered north", "registered south"]
    assert superlink.admitted == ["north", "south"]
    assert load_pem_public_key(superlink.nodes[0].public_key).curve.name == "secp384r1"
    assert register.apply_changes(keys, superlink) == []


def test_revoked_key_is_removed_and_rotated_key_replaced(keys: KeyFolder) -> None:
    superlink = SuperLink()
    register.apply_changes(keys, superlink)
    keys.revoke("south", now())
    assert register.apply_changes(keys, superlink) == ["unregistered south: its key is revoked"]
    keys.rotate_hospital("north", now())
    assert register.apply_changes(keys, superlink) == [
        "unregistered north: its key is revoked",
        "registered north",
    ]
    assert superlink.admitted == ["north"]
    assert register.apply_changes(keys, superlink) == []


def test_bound_of_images_is_registered_with_the_key(tmp_path: Path) -> None:
    keys = KeyFolder.create(tmp_path / "keys", ["north=1200", "south"], [], 365, now())
    superlink = SuperLink()
    register.apply_changes(keys, superlink)
    assert superlink.admitted == ["north=1200", "south"]
    keys.rotate_hospital("north", now())
    keys.rotate_hospital("south=900", now())
    register.apply_changes(keys, superlink)
    assert superlink.admitted == ["north=1200", "south=900"]


def test_key_revoked_before_registration_is_not_registered(keys: KeyFolder) -> None:
    superlink = SuperLink()
    keys.revoke("north", now())
    assert register.apply_changes(keys, superlink) == ["registered south"]


def test_key_outside_the_list_is_kept(keys: KeyFolder) -> None:
    superlink = SuperLink(
        [SimpleNamespace(public_key=b"by hand", node_id=7, name="manual", status="online")]
    )
    register.apply_changes(keys, superlink)
    assert superlink.admitted == ["manual", "north", "south"]


def test_damaged_public_key_is_an_error_before_any_change(keys: KeyFolder) -> None:
    superlink = SuperLink()
    (keys.path / keys.registrations()[1].public_key).write_text("nothing")
    with pytest.raises(ConfigError, match="fedgan keys rotate south"):
        register.apply_changes(keys, superlink)
    assert superlink.nodes == []


def test_wait_for_an_absent_superlink_is_bounded(
    keys: KeyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    code = register.main(["--keys", str(keys.path), "--superlink", "127.0.0.1:9", "--wait", "0.1"])
    assert code == 5
    assert capsys.readouterr().err.startswith(
        "register: no SuperLink replies at 127.0.0.1:9 (waited 0 s: "
    )


def test_folder_without_keys_names_the_command_that_creates_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert register.main(["--keys", str(tmp_path)]) == 2
    assert "fedgan keys NAME" in capsys.readouterr().err
