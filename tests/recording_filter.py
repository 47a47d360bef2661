"""The path filter as a program that also writes each request it is asked to FEDGAN_RECORDING: NUMBER.json, in their order."""

from __future__ import annotations

import base64
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from fedgan import files
from server.filter import __main__ as program
from server.filter.app import Filter

FOLDER = Path(os.environ["FEDGAN_RECORDING"])


class Recording(Filter):
    """Writes a request when its body is whole."""

    numbers = itertools.count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()

        async def heard() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            if message["type"] == "http.request" and not message.get("more_body", False):
                headers = {name.decode(): value.decode() for name, value in scope["headers"]}
                told = {
                    "path": scope["raw_path"].decode(),
                    "headers": headers,
                    "body": base64.b64encode(body).decode(),
                }
                files.write_json(FOLDER / f"{next(self.numbers):05}.json", told)
            return message

        await super().__call__(scope, heard, send)


if __name__ == "__main__":
    program.Filter = Recording  # type: ignore[misc]
    sys.exit(program.main())
