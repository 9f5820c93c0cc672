"""Gzip and zstd files over HTTP that arrive whole, whatever the server does in between."""

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
# In a row, each with less than LEAST_BYTES that were not there before. The delays alone are 22 minutes, and failures
# that take as long as they may, 23 more.
FAILURES = 17
# What asking again does not change: most answers that blame the request, and two that refuse it for good. 416 is the
# answer to a range, and begins the file anew.
FINAL_STATUSES = {*range(400, 500), 501, 505} - {408, 416, 425, 429}
FINAL_ERRORS = (
    requests.TooManyRedirects, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL,
)  # fmt: skip
CHUNK_BYTES = 2**20


class _FailureError(Exception):
    """One that may pass."""


def fetch_compressed(address: str, path: Path, stop: threading.Event) -> None:
    """Downloads a compressed file unless it is there, and checks its length and its own checksums over its content.

    A gzip always has checksums, a zstd file has them if whoever made it wanted so. Either may consist of several, and
    breaking off between two of them leaves a file that is whole: only the length that the server states tells. Where
    it states none, or a wrong one, nothing does.

    Connections that fail, drop, stall or hardly bring anything, server errors, and content that turns out truncated or
    altered, are tried again, with growing delays; a download that broke off goes on where it stopped, also in a later
    process. Content that comes twice with the same damage is refused: so it lies on the server. A file that an earlier
    process finished is checked again, and fetched again if it is damaged.

    Args:
        address: http or https.
        path: where the file appears once it is whole, and on disk.
        stop: set to leave.

    Raises:
        DynarouteError: the server refuses the file, sends nothing or one of another kind or a damaged one, or keeps
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
                download.begin_anew()
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
    """What has come of a file so far: its beginning, in `part`, and how long the server says that it is."""

    def __init__(self, address: str, part: Path) -> None:
        self.address, self.part = address, part
        self.total: int | None = None  # bytes; None: not stated yet
        self.damaged: str | None = None  # SHA-256 of what came whole last, and was damaged

    def begin_anew(self) -> None:
        """Drops what is of no use: it is not the file's beginning."""
        self.part.unlink(missing_ok=True)
        self.total = None

    def resume(self, stop: threading.Event) -> None:
        """Asks once for what `part` lacks, and appends it.

        Raises:
            _FailureError: what has been there before is of no use.
            requests.RequestException, urllib3.exceptions.HTTPError: what is there now can be resumed from.
        """
        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # the file as it is
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = CONNECT_SECONDS, READ_SECONDS  # the latter without a single byte
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
                # read1 returns what has come, whereas read would wait for a whole chunk, however slowly it comes.
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
        """Checks what came whole.

        Raises:
            DynarouteError: asking again would not change it: it is empty, of another kind, or damaged as it was before.
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
    """Raises _FailureError if a compressed file is not whole, by the lengths and checksums in it."""
    try:
        with path.open("rb") as file, decompressed(file) as content:
            if not content.peek(1):  # also where there is no gzip at all, but no byte
                raise EOFError("it holds nothing")
            while content.read(CHUNK_BYTES):
                pass
    except (EOFError, OSError, zlib.error) as error:
        raise _FailureError(f"damaged gzip or zstd: {error}") from error
