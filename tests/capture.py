"""What left a hospital, put together again from the requests that a recording filter saw (tests/recording_filter.py)."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path

from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from client.wire import unpack_bundles
from fedgan.exchange.bundle import BUNDLE

PUSH_OBJECT, PUSH_MESSAGES = "/v1/fleet/push-object", "/v1/fleet/push-messages"


class Capture:
    """All requests under one public key (PEM): the answers in them, objects that belong to none, and bodies by path."""

    def __init__(self, recording: Path, public_key: bytes) -> None:
        self.messages: dict[
            str, Message
        ] = {}  # by object id: a SuperNode pushes again what a busy SuperLink did not take
        self.headers: set[str] = set()
        self.parcels: dict[
            str, str
        ] = {}  # by object id of its message, the SHA-256 of the parcel's bytes
        self.objects: dict[str, bytes] = {}
        self.largest: Counter[str] = Counter()  # bytes of the largest body under each path
        pushes = []
        for file in sorted(recording.glob("[0-9]*.json")):
            told = json.loads(file.read_text())
            if base64.b64decode(told["headers"].get("flwr-public-key", "")) != public_key:
                continue
            body = base64.b64decode(told["body"])
            self.headers |= set(told["headers"])
            self.largest[told["path"]] = max(self.largest[told["path"]], len(body))
            if told["path"] == PUSH_OBJECT:
                content = PushObjectRequest.FromString(body).object_content
                self.objects[get_object_id(content)] = content
            if told["path"] == PUSH_MESSAGES:
                pushes.append(PushMessagesRequest.FromString(body))
        self.strays = set(self.objects)
        for push in pushes:
            inside = [
                message
                for message in push.messages_list
                if message.ByteSize() - message.metadata.ByteSize() > 40
            ]
            assert not inside, "a message with its content inside"
            for tree in push.message_object_trees:
                if tree.object_id not in self.messages:
                    self.messages[tree.object_id] = self._inflate(tree.object_id)

    def _inflate(self, key: str) -> Message:
        contents = self.objects.copy()  # taken out of as they are read
        message = inflate_object_from_contents(key, contents)
        self.strays -= set(self.objects) - set(contents)
        assert isinstance(message, Message)
        for record in message.content.array_records.values():
            (array,) = record.values()
            assert (array.dtype, array.shape, array.stype) == ("uint8", (len(array.data),), BUNDLE)
            self.parcels[key] = hashlib.sha256(array.data).hexdigest()
        unpack_bundles(message.content)
        return message
