"""Downloads gzip and zstd files over HTTP completely, whatever the server does in between."""

import re
import threading
import time
import zlib
from pathlib import Path

import requests
import urllib3

from dynaroute.data.text.sources import decompressed, is_zstd
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import flush, sha256

CONNECT_SECONDS = 20.0
READ_SECONDS, LEAST_BYTES = 60.0, 2**16  # a read that brings less than that in that time has stalled
FIRST_DELAY, LONGEST_DELAY = 1.0, 120.0  # seconds between failures, doubling
FAILURES = 17  # in a row, each with fewer than LEAST_BYTES new bytes: 22 minutes of delays, and 23 at most of failing
# Not worth a retry: most 4xx, and two 5xx that are permanent. 416 answers a range, and restarts the file.
FINAL_STATUSES = {*range(400, 500), 501, 505} - {408, 416, 425, 429}
FINAL_ERRORS = requests.TooManyRedirects, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL
CHUNK_BYTES = 2**20


class _FailureError(Exception):
    """A failure that makes what was downloaded useless, but may pass."""


def fetch_compressed(address: str, path: Path, stop: threading.Event) -> None:
    """Downloads a compressed file to `path` unless it is there; checks its length and its own checksums.

    A gzip always has checksums, a zstd file optionally. Both formats allow several streams in one file, so a file cut
    between two streams looks whole: only the length that the server states can tell. If it states none or a wrong one,
    the cut goes unnoticed.

    Failed, dropped, stalled and slow connections, server errors, and truncated or altered content are retried with
    growing delays. A broken download resumes where it stopped, also in a later process. Content that arrives twice with
    the same damage is refused, since it must be damaged on the server. A file from an earlier process is checked again,
    and fetched again if it is damaged.

    Raises:
        DynarouteError: the server refuses the file, sends nothing, another kind of file or a damaged one, or keeps
            failing; or `stop` was set.
    """
    if path.exists():
        try:
            _check(path)
            return
        except _FailureError:
            path.unlink()
    download = _Download(address, path.with_name(f"{path.name}.part"))
    part = download.part
    failures, furthest = 0, 0
    while True:
        try:
            download.resume(stop)
            download.check()
        except FINAL_ERRORS as error:
            raise DynarouteError(f"{address}: {error}") from error
        except (_FailureError, requests.RequestException, urllib3.exceptions.HTTPError) as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size >= furthest + LEAST_BYTES else failures + 1
            furthest = max(furthest, size)
            if isinstance(error, _FailureError):
                part.unlink(missing_ok=True)
                download.total = None
            if failures >= FAILURES:
                reason = " ".join(str(error).split())[:200]
                raise DynarouteError(
                    f"{address}: {failures} failures without progress, the last one: {reason}: "
                    "the same command resumes from here"
                ) from error
            if stop.wait(min(LONGEST_DELAY, FIRST_DELAY * 2**failures)):
                raise DynarouteError(f"{address}: left") from error
        else:
            flush(part)
            part.replace(path)
            flush(path.parent)
            return


class _Download:
    """A download in progress: the file's beginning in `part`, and its length as stated by the server."""

    def __init__(self, address: str, part: Path) -> None:
        self.address, self.part = address, part
        self.total: int | None = None  # bytes; None: not stated yet
        self.damaged: str | None = None  # SHA-256 of the last complete but damaged content

    def resume(self, stop: threading.Event) -> None:
        """Requests the rest of the file once, and appends it to `part`.

        Raises:
            _FailureError: `part` is useless.
            requests.RequestException, urllib3.exceptions.HTTPError: the next call can resume from `part`.
        """
        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # the file without a further compression
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = CONNECT_SECONDS, READ_SECONDS  # the second one without a single byte
        with requests.get(self.address, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code in FINAL_STATUSES:
                raise DynarouteError(f"{self.address}: the server answers {response.status_code} {response.reason}")
            if response.status_code == 416:
                raise _FailureError("the server has nothing after what was read")
            response.raise_for_status()
            resumed = response.status_code == 206
            if resumed:
                content_range = response.headers.get("Content-Range", "")
                found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
                if found is None or int(found[1]) != have:
                    raise _FailureError("the server answers with another range than was asked for")
                total = None if found[2] == "*" else int(found[2])
            else:  # the whole file, whatever was there
                self.total, total = None, response.raw.length_remaining  # of Content-Length
            if None not in (total, self.total) and total != self.total:
                raise _FailureError(f"the file had {self.total} bytes, and has {total} now")
            self.total = total if self.total is None else self.total
            with self.part.open("ab" if resumed else "wb") as file:
                since, received = time.monotonic(), 0
                # read1 returns what has arrived; read would wait for a whole chunk, however slow.
                while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
                    file.write(chunk)
                    if stop.is_set():
                        raise DynarouteError(f"{self.address}: left")
                    received += len(chunk)
                    if (seconds := time.monotonic() - since) >= READ_SECONDS:
                        if received < LEAST_BYTES:
                            raise requests.ConnectionError(f"stalled: {received} bytes in {seconds:.1f} seconds")
                        since, received = time.monotonic(), 0
        size = self.part.stat().st_size
        if self.total is not None and size < self.total:
            raise requests.ConnectionError(f"{size} bytes came of {self.total}")
        if self.total is not None and size > self.total:
            raise _FailureError(f"{size} bytes came of {self.total}")

    def check(self) -> None:
        """Checks a complete download.

        Raises:
            DynarouteError: a retry would not help: it is empty, no gzip or zstd, or damaged as it was before.
            _FailureError: it is damaged.
        """
        with self.part.open("rb") as file:
            beginning = file.read(32)
        if beginning[:2] != b"\x1f\x8b" and not is_zstd(beginning[:4]):
            self.part.unlink()
            what = "a web page" if beginning.lstrip().startswith(b"<") else "a file" if beginning else "an empty file"
            raise DynarouteError(
                f"{self.address}: the server sends {what} that is neither gzip nor zstd: {beginning!r}"
            )
        try:
            _check(self.part)
        except _FailureError as error:
            before, self.damaged = self.damaged, sha256(self.part)
            if self.damaged != before:
                raise
            self.part.unlink()
            raise DynarouteError(f"{self.address}: came twice with the same damage: {error}") from error


def _check(path: Path) -> None:
    """Raises _FailureError if a compressed file contradicts the lengths and checksums in it."""
    try:
        with path.open("rb") as file, decompressed(file) as content:
            if not content.peek(1):  # also for an empty file
                raise EOFError("it holds nothing")
            while content.read(CHUNK_BYTES):
                pass
    except (EOFError, OSError, zlib.error) as error:
        raise _FailureError(f"damaged gzip or zstd: {error}") from error
