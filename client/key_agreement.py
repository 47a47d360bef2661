"""Allow-list of secure aggregation's key agreement: public keys, encrypted shares and single shares
of secrets.

A public key is parsed and serialized again, a list is as long as the server's request requires, and
a share or ciphertext has a bounded length. Their bits are random, so nothing more can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from fedgan.exchange.error_messages import SHAPE, TYPE, VALUE, Refused

KEYS = "keys"  # name of the record
MAX_BYTES = {Key.CIPHERTEXT_LIST: 1024, Key.SHARE_LIST: 512}  # per item

Check = Callable[[Any, Mapping[str, Any], int], Any]  # value, the server's config, own node id
Nodes = Callable[[Mapping[str, Any], int], set[int]]


def _public_key(value: Any, config: Mapping[str, Any], node: int) -> bytes:
    key = bytes_to_public_key(value)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("no P-384 public key")
    return public_key_to_bytes(key)


def _other_nodes(config: Mapping[str, Any], node: int) -> set[int]:
    return {int(key) for key in config if key != Key.STAGE} - {node}


def _all_nodes(config: Mapping[str, Any], node: int) -> set[int]:
    return {*config[Key.ACTIVE_NODE_ID_LIST], *config[Key.DEAD_NODE_ID_LIST]}


def _node_ids(expected: Nodes) -> Check:
    def check(value: Any, config: Mapping[str, Any], node: int) -> list[int]:
        if any(type(item) is not int for item in value) or sorted(value) != sorted(
            expected(config, node)
        ):
            raise ValueError("other nodes than the request names")
        return list(value)

    return check


def _secrets(name: str, expected: Nodes) -> Check:
    def check(value: Any, config: Mapping[str, Any], node: int) -> list[bytes]:
        if len(value) != len(expected(config, node)) or any(
            type(item) is not bytes or len(item) > MAX_BYTES[name] for item in value
        ):
            raise ValueError("not one item of bounded length per node")
        return list(value)

    return check


# By stage and name: type and meaning for the documentation, and the check.
ALLOWED: dict[str, dict[str, tuple[str, str, Check]]] = {
    Stage.SETUP: {
        Key.PUBLIC_KEY_1: ("bytes", "public key of this round for the masks", _public_key),
        Key.PUBLIC_KEY_2: (
            "bytes",
            "public key of this round for the encryption of shares",
            _public_key,
        ),
    },
    Stage.SHARE_KEYS: {
        Key.DESTINATION_LIST: (
            "whole numbers",
            "nodes that receive the shares",
            _node_ids(_other_nodes),
        ),
        Key.CIPHERTEXT_LIST: (
            "bytes per node",
            "shares of its two secrets, each encrypted for one other hospital",
            _secrets(Key.CIPHERTEXT_LIST, _other_nodes),
        ),
    },
    Stage.UNMASK: {
        Key.NODE_ID_LIST: (
            "whole numbers",
            "nodes whose secrets the shares belong to",
            _node_ids(_all_nodes),
        ),
        Key.SHARE_LIST: (
            "bytes per node",
            "its share of one secret per node: "
            "of the own mask of a node that replied, of the first key of a lost node",
            _secrets(Key.SHARE_LIST, _all_nodes),
        ),
    },
}


def check_keys(
    stage: str, config: Mapping[str, Any], record: Mapping[str, Any], node: int
) -> dict[str, Any]:
    """The record's values, rebuilt. `config`: the server's request, `node`: this hospital's node
    id.

    Raises `Refused` for a name or a value that is not listed for this stage.
    """
    allowed, checked = ALLOWED[stage], {}
    for name, value in record.items():
        if name not in allowed:
            raise Refused(VALUE, f"'{name}' in {KEYS}")
        kind, _, check = allowed[name]
        if not isinstance(value, bytes if kind == "bytes" else list):
            raise Refused(TYPE, f"'{name}' in {KEYS} as {type(value).__name__}, allowed is {kind}")
        try:
            checked[name] = check(value, config, node)
        except ValueError as error:
            raise Refused(SHAPE, f"'{name}' in {KEYS}: {error}") from error
    return checked
