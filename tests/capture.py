"""Messages of a hospital, reassembled from the recorded requests (tests/recording_proxy.py)."""

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
    """Requests under one public key (PEM): replies, unreferenced objects, body sizes."""

    def __init__(self, recording: Path, public_key: bytes) -> None:
        # by object id: a SuperNode pushes again what a busy SuperLink refused
        self.messages: dict[str, Message] = {}
        self.headers: set[str] = set()
        self.bundles: dict[str, str] = {}  # by object id of the message: SHA-256 of its bundle
        self.objects: dict[str, bytes] = {}
        self.largest: Counter[str] = Counter()  # bytes of the largest body per path
        pushes = []
        for file in sorted(recording.glob("[0-9]*.json")):
            recorded = json.loads(file.read_text())
            if base64.b64decode(recorded["headers"].get("flwr-public-key", "")) != public_key:
                continue
            body = base64.b64decode(recorded["body"])
            self.headers |= set(recorded["headers"])
            self.largest[recorded["path"]] = max(self.largest[recorded["path"]], len(body))
            if recorded["path"] == PUSH_OBJECT:
                content = PushObjectRequest.FromString(body).object_content
                self.objects[get_object_id(content)] = content
            if recorded["path"] == PUSH_MESSAGES:
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
        contents = self.objects.copy()  # inflating removes what it reads
        message = inflate_object_from_contents(key, contents)
        self.strays -= set(self.objects) - set(contents)
        assert isinstance(message, Message)
        for record in message.content.array_records.values():
            (array,) = record.values()
            assert (array.dtype, array.shape, array.stype) == ("uint8", (len(array.data),), BUNDLE)
            self.bundles[key] = hashlib.sha256(array.data).hexdigest()
        unpack_bundles(message.content)
        return message
