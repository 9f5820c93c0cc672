"""Downloads files over HTTP, and resumes what breaks off."""

import re
import threading
from pathlib import Path

import requests
import urllib3

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import flush

TIMEOUTS = 20.0, 60.0  # seconds to connect, and without a single byte
FIRST_DELAY, LONGEST_DELAY = 1.0, 120.0  # seconds between failures, doubling
FAILURES = 17  # in a row, each without a new byte: 22 minutes of delays, and 23 at most of failing
# Not worth a retry: most 4xx, and two 5xx that are permanent. 416 answers a range, and restarts the file.
FINAL_STATUSES = {*range(400, 500), 501, 505} - {408, 416, 425, 429}
FINAL_ERRORS = requests.TooManyRedirects, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL
CHUNK_BYTES = 2**16


def fetch(address: str, path: Path, stop: threading.Event) -> None:
    """Downloads a file to `path` unless it is there; its length is the one that the server states, if it states one.

    Failed, broken and silent connections and server errors are retried with growing delays. A broken download resumes
    where it stopped, also in a later process.

    Raises:
        DynarouteError: the server refuses the file or keeps failing; or `stop` was set.
    """
    part = path.with_name(f"{path.name}.part")
    failures = furthest = 0
    while not path.exists():
        try:
            _resume(address, part, stop)
            flush(part)
            part.replace(path)
        except FINAL_ERRORS as error:
            raise DynarouteError(f"{address}: {error}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size > furthest else failures + 1
            furthest = max(furthest, size)
            if failures >= FAILURES:
                reason = " ".join(str(error).split())[:200]
                raise DynarouteError(
                    f"{address}: {failures} failures without progress, the last one: {reason}: "
                    "the same command resumes from here"
                ) from error
            if stop.wait(min(LONGEST_DELAY, FIRST_DELAY * 2**failures)):
                raise DynarouteError(f"{address}: left") from error


def _resume(address: str, part: Path, stop: threading.Event) -> None:
    """Requests the rest of a file once, and appends it to `part`.

    Raises:
        requests.RequestException, urllib3.exceptions.HTTPError: the next call can resume from `part`, if it is there.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        if response.status_code in FINAL_STATUSES:
            raise DynarouteError(f"{address}: the server answers {response.status_code} {response.reason}")
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        resumed = response.status_code == 206
        if response.status_code == 416 or (resumed and (content_range is None or int(content_range[1]) != have)):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"the server has another range than was asked for, {have} bytes on")
        response.raise_for_status()
        with part.open("ab" if resumed else "wb") as file:
            # The bytes of the file, also where the server calls its gzip an encoding. Raises if they are too few.
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                if stop.is_set():
                    raise DynarouteError(f"{address}: left")
    if resumed and content_range[2] not in ("*", str(size := part.stat().st_size)):
        raise requests.ConnectionError(f"{size} bytes came of {content_range[2]}")
