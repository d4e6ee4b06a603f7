"""A web server of a folder on the loopback that fails as networks do, and counts what it is asked for."""

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = str | float | None
"""A status such as "500"; "reset", "cut" or "garble" half-way; seconds to wait; or nothing."""


class Web:
    """What a server does and has done.

    Args:
        root: the folder.
        parts: whether it sends parts of files.
    """

    def __init__(self, root: Path, *, parts: bool = True) -> None:
        self.root = root
        self.parts = parts
        self.faults: Callable[[str, int], Fault] = lambda name, number: None
        """Takes a file's name, and how often it was asked for before."""
        self.asked: Counter[str] = Counter()
        """Times that each file was asked for."""
        self.whole: Counter[str] = Counter()
        """Times that it was from its first byte to its last."""
        self.url = ""
        self.lock = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/")
        with self.lock:
            number = self.asked[name]
            self.asked[name] += 1
            self.whole[name] += "Range" not in handler.headers
        fault = self.faults(name, number)
        if isinstance(fault, float):
            time.sleep(fault)
        path = self.root / name
        if (isinstance(fault, str) and fault.isdigit()) or not path.is_file():
            handler.send_error(int(fault) if isinstance(fault, str) and fault.isdigit() else 404)
            return
        content = path.read_bytes()
        start, stop = 0, len(content)
        asked = handler.headers.get("Range")
        if asked and self.parts:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, stop) if last else stop
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(stop - start))
        handler.end_headers()
        part = content[start:stop]
        if fault == "garble":
            part = bytes([part[0] ^ 1]) + part[1:]
        if fault in ("reset", "cut"):
            handler.wfile.write(part[: len(part) // 2])
            handler.wfile.flush()
            if fault == "reset":  # closing then sends RST
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            return
        handler.wfile.write(part)


@contextmanager
def serve(root: Path, *, parts: bool = True) -> Iterator[Web]:
    """Serve a folder until the block ends."""
    web = Web(root, parts=parts)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # whoever asked has gone
                web.answer(self)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield web
        server.shutdown()
