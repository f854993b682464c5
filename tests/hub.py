"""A Hugging Face hub on loopback, as much of it as its client's libraries ask for."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any, ClassVar


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does; subclasses say what there is."""

    files: ClassVar[dict[str, bytes]]

    def do_GET(self) -> None:
        raise NotImplementedError

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, body: bytes | None, **headers: str) -> None:
        """200 with a body, or 404; headers with `_` for `-`."""
        self.send_response(404 if body is None else 200)
        for name, value in {**headers, "Content_Length": str(len(body or b""))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    def answer_tree(self) -> None:
        listed = [{"type": "file", "path": file, "oid": "0" * 40, "size": len(blob)} for file, blob in self.files.items()]
        self.answer(json.dumps(listed).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[Hub]) -> Iterator[dict[str, str]]:
    """The environment in which the hub is a server with this handler."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()
