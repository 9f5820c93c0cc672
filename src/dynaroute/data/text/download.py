"""Gzip files over HTTP that arrive whole, whatever the server does in between."""

import gzip
import queue
import re
import threading
import time
import zlib
from pathlib import Path

import requests
import urllib3

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import flush

CONNECT_SECONDS = 20.0
READ_SECONDS, LEAST_BYTES = 60.0, 2**16  # a read that brings less than that in that time has stalled
FIRST_DELAY, LONGEST_DELAY = 1.0, 120.0  # seconds between failures, doubling
# In a row, each with less than LEAST_BYTES that were not there before. The delays alone are 22 minutes, and failures
# that take as long as they may, 23 more.
FAILURES = 17
FINAL_STATUSES = {400, 401, 403, 404, 405, 406, 410, 451}  # what asking again does not change
CHUNK_BYTES = 2**20


class _FailureError(Exception):
    """One that may pass."""


def fetch_gzip(address: str, path: Path, stop: threading.Event) -> None:
    """Downloads a gzip file unless it is there, and checks it: its length, and its own checksums over all its content.

    A gzip may consist of several, each with its own checksum, and breaking off between two of them leaves a gzip that
    is whole: only the length that the server states tells. Where it states none, or a wrong one, nothing does.

    Connections that fail, drop, stall or hardly bring anything, server errors, and content that turns out truncated or
    altered are tried again, with growing delays; a download that broke off goes on where it stopped, also in a later
    process. One that an earlier process finished is checked again, and fetched again if it is damaged.

    Args:
        address: http or https.
        path: where the file appears once it is whole, and on disk.
        stop: set to leave.

    Raises:
        DynarouteError: the server refuses the file, or goes on failing, or `stop` was set.
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
            download.go_on(stop)
            _check(part)
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
                    "the same command goes on from here"
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

    def begin_anew(self) -> None:
        """Drops what is of no use: it is not the file's beginning."""
        self.part.unlink(missing_ok=True)
        self.total = None

    def go_on(self, stop: threading.Event) -> None:
        """Asks once for what `part` lacks, and appends it.

        Raises:
            _FailureError: what has been there before is of no use.
            requests.RequestException, urllib3.exceptions.HTTPError: what is there now may be gone on with.
        """
        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # the gzip as it is
        if have:
            headers["Range"] = f"bytes={have}-"
        with _ask(self.address, headers) as response:
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


def _ask(address: str, headers: dict[str, str]) -> requests.Response:
    """What the server answers, whose content is still to be read.

    Raises:
        requests.RequestException: there is no answer, or it takes too long.
    """
    answers: queue.SimpleQueue[requests.Response | Exception] = queue.SimpleQueue()

    def get() -> None:
        try:
            answers.put(requests.get(address, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)))
        except Exception as error:
            answers.put(error)

    # In a thread, since the time limit of `requests` counts anew with every byte of the headers.
    threading.Thread(target=get, daemon=True).start()
    seconds = CONNECT_SECONDS + READ_SECONDS
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty as error:
        raise requests.ReadTimeout(f"no answer in {seconds:g} seconds") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _check(path: Path) -> None:
    """Raises _FailureError if a gzip is not whole: its end says how long its content is, and the content's CRC."""
    try:
        with gzip.open(path) as content:
            if not content.peek(1):  # also where there is no gzip at all, but no byte
                raise EOFError("it holds nothing")
            while content.read(CHUNK_BYTES):
                pass
    except (EOFError, OSError, zlib.error) as error:
        raise _FailureError(f"not a whole gzip: {error}") from error
