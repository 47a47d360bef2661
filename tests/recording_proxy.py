"""A TLS relay in front of the proxy that records every request: python -m recording_proxy
KEYS FOLDER PORT PROXY_PORT writes FOLDER/NUMBER.json for each, in the order of their arrival.

It reads requests with a Content-Length, as SuperNodes send them.
"""

from __future__ import annotations

import base64
import http.client
import http.server
import itertools
import ssl
import sys
from pathlib import Path

from fedgan import files

HOST = "127.0.0.1"


class Recorder(http.server.BaseHTTPRequestHandler):
    """Writes a request when its body is complete, then forwards it."""

    protocol_version = "HTTP/1.1"
    folder: Path
    proxy_port: int
    context: ssl.SSLContext
    numbers = itertools.count()

    def setup(self) -> None:
        super().setup()
        self.proxy = http.client.HTTPSConnection(
            HOST, self.proxy_port, context=self.context, timeout=120
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = {"path": self.path, "headers": headers, "body": base64.b64encode(body).decode()}
        files.write_json(self.folder / f"{next(self.numbers):05}.json", request)
        self.proxy.request("POST", self.path, body, headers)
        answer = self.proxy.getresponse()
        content = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def finish(self) -> None:
        self.proxy.close()
        super().finish()

    def log_message(self, *_: object) -> None:
        pass


def main(keys: str, folder: str, port: str, proxy_port: str) -> None:
    Recorder.folder, Recorder.proxy_port = Path(folder), int(proxy_port)
    Recorder.context = ssl.create_default_context(cafile=f"{keys}/ca.crt")
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(f"{keys}/server.crt", f"{keys}/server.key")
    server = http.server.ThreadingHTTPServer((HOST, int(port)), Recorder)
    server.socket = server_context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
