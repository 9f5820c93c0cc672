"""A server on the loopback that gives files away as badly as it is told to."""

import contextlib
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Serves `files`, {name: bytes}; `faults[name]` says what befalls the next requests for it, one after the other.

    drop: the connection closes after a third; stall: nothing comes after a third; truncate: about a third of a range
    is served; reset: the connection closes at once; ignore_range, wrong_range: the range asked for is not what comes;
    labelled: the gzip is said to be the encoding of the file, as some servers do; first_member: what comes ends
    with the first of the file's gzips, but the length of the file is stated; unstated: nothing says how long it is;
    other_total: a range is said to be of a file of another length; a number: that status.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.faults, self.requests = files, {}, []  # requests: (name, first byte asked for)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Yields the address at which the files are."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def _handler(self) -> type:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                wanted = self.headers.get("Range")
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
                owner.requests.append((name, start))
                fault = owner.faults[name].pop(0) if owner.faults.get(name) else None
                with contextlib.suppress(OSError):  # the client may have left
                    owner._answer(self, name, start, fault)

        return Handler

    def _answer(self, handler: BaseHTTPRequestHandler, name: str, start: int, fault: str | int | None) -> None:
        if fault == "reset":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(fault, int) or name not in self.files:
            handler.send_error(fault if isinstance(fault, int) else 404)
            return
        data = self.files[name]
        if start >= len(data):
            handler.send_error(416)
            return
        if fault == "ignore_range":
            start = 0
        body = data[start:]
        if fault == "truncate":
            body = body[: len(body) // 3]
        elif fault == "first_member":
            body = data[start : first_member(data)] or body
        handler.send_response(206 if start else 200)
        if start:
            first = start - 1 if fault == "wrong_range" else start
            total = "*" if fault == "unstated" else len(data) + (fault == "other_total")
            handler.send_header("Content-Range", f"bytes {first}-{start + len(body) - 1}/{total}")
        if fault == "labelled":
            handler.send_header("Content-Encoding", "gzip")
        if fault != "unstated":
            handler.send_header(
                "Content-Length", str(len(data) if fault == "first_member" and not start else len(body))
            )
        handler.end_headers()
        if fault in ("drop", "stall"):
            handler.wfile.write(body[: len(body) // 3])
            handler.wfile.flush()
            if fault == "stall":
                time.sleep(1.0)
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.wfile.write(body)


def first_member(data: bytes) -> int:
    """The bytes of the first of several gzips."""
    decompressor = zlib.decompressobj(wbits=31)
    decompressor.decompress(data)
    return len(data) - len(decompressor.unused_data)
