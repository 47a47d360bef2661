"""What secure aggregation may send besides a masked change: public keys, and encrypted or single shares of secrets.

Each is checked for what it is: a public key is read and written anew, a list is as long as the server's question asks, a share
and a ciphertext have the length that theirs have. Their bits are random, so that more cannot be known of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from client.error_messages import SHAPE, TYPE, VALUE, Refused

KEYS = "keys"  # the record that holds them
LONGEST = {Key.CIPHERTEXT_LIST: 1024, Key.SHARE_LIST: 512}  # bytes of one

Check = Callable[[Any, Mapping[str, Any], int], Any]


def _public(value: Any, asked: Mapping[str, Any], node: int) -> bytes:
    key = bytes_to_public_key(value)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("no public key of P-384")
    return public_key_to_bytes(key)


def _others(asked: Mapping[str, Any], node: int) -> set[int]:
    return {int(key) for key in asked if key != Key.STAGE} - {node}


def _all(asked: Mapping[str, Any]) -> set[int]:
    return {*asked[Key.ACTIVE_NODE_ID_LIST], *asked[Key.DEAD_NODE_ID_LIST]}


def _nodes(expected: Callable[[Mapping[str, Any], int], set[int]]) -> Check:
    def check(value: Any, asked: Mapping[str, Any], node: int) -> list[int]:
        if any(type(item) is not int for item in value) or sorted(value) != sorted(
            expected(asked, node)
        ):
            raise ValueError("other nodes than were asked about")
        return list(value)

    return check


def _secrets(name: str, expected: Callable[[Mapping[str, Any], int], set[int]]) -> Check:
    def check(value: Any, asked: Mapping[str, Any], node: int) -> list[bytes]:
        if len(value) != len(expected(asked, node)) or any(
            type(item) is not bytes or len(item) > LONGEST[name] for item in value
        ):
            raise ValueError("more than one of them for each node")
        return list(value)

    return check


# By stage and name: type and meaning for people, and the check.
ALLOWED: dict[str, dict[str, tuple[str, str, Check]]] = {
    Stage.SETUP: {
        Key.PUBLIC_KEY_1: ("bytes", "public key, made for this round, of the masks", _public),
        Key.PUBLIC_KEY_2: (
            "bytes",
            "public key, made for this round, of the shares' encryption",
            _public,
        ),
    },
    Stage.SHARE_KEYS: {
        Key.DESTINATION_LIST: ("whole numbers", "nodes that the shares are for", _nodes(_others)),
        Key.CIPHERTEXT_LIST: (
            "bytes of each",
            "shares of its two secrets, encrypted for one other hospital",
            _secrets(Key.CIPHERTEXT_LIST, _others),
        ),
    },
    Stage.UNMASK: {
        Key.NODE_ID_LIST: (
            "whole numbers",
            "nodes that the shares are of",
            _nodes(lambda asked, node: _all(asked)),
        ),
        Key.SHARE_LIST: (
            "bytes of each",
            "its share of one secret of each: of the own mask of who has answered, of the first key of who was lost",
            _secrets(Key.SHARE_LIST, lambda asked, node: _all(asked)),
        ),
    },
}


def checked_keys(
    stage: str, asked: Mapping[str, Any], record: Mapping[str, Any], node: int
) -> dict[str, Any]:
    """The values of the record, made anew. `asked`: the server's question, `node`: this hospital's.

    Raises `Refused` for a name or a value that is not listed for this stage.
    """
    allowed, found = ALLOWED[stage], {}
    for name, value in record.items():
        if name not in allowed:
            raise Refused(VALUE, f"'{name}' in {KEYS}")
        kind, _, check = allowed[name]
        if not isinstance(value, bytes if kind == "bytes" else list):
            raise Refused(TYPE, f"'{name}' in {KEYS} as {type(value).__name__}, may be {kind}")
        try:
            found[name] = check(value, asked, node)
        except ValueError as error:
            raise Refused(SHAPE, f"'{name}' in {KEYS}: {error}") from error
    return found
