"""Files at URLs, read whole or in part and tried again where a network fails; knows nothing of what they hold."""

import io
import random
import re
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from fcmae.errors import UserError, brief

TIMEOUT_S = 30.0
"""Without a byte, after which a connection counts as lost."""
TRIES = 6
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 16.0
"""Between tries, on average half of it: twice as long each time."""
PIECE = 1 << 20
"""Bytes at a time; so many received, the tries are counted anew."""
READ_AHEAD = 1 << 24
"""Bytes that are asked of an object store at once."""

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""By protocol, what fsspec needs."""

TRY_AGAIN = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
"""Of the answers that say it is the client's fault."""


class Refused(OSError):
    """An answer that stays the same however often one asks, such as 404."""


class NoParts(OSError):
    """The server sends files whole only."""


def is_url(place: str) -> bool:
    """Whether a place is a URL, such as https://host/path or s3://bucket/path, and no path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def join(place: str, name: str) -> str:
    """Return the place of a file in a folder at a URL."""
    return f"{place.rstrip('/')}/{name}"


def _delay_s(tries: int) -> float:
    most = min(FIRST_DELAY_S * 2 ** (tries - 1), LONGEST_DELAY_S)
    return random.SystemRandom().uniform(0, most)  # no generator of others


def _open_http(url: str, start: int, stop: int | None) -> IO[bytes]:
    part = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
    try:
        answer = urlopen(Request(url, headers={"User-Agent": "fcmae", **part}), timeout=TIMEOUT_S)
    except HTTPError as error:
        with error:
            said = f"HTTP {error.code} {error.reason}"
            final = error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in TRY_AGAIN
        raise (Refused if final else OSError)(said) from None
    if start and answer.status != HTTPStatus.PARTIAL_CONTENT:
        answer.close()
        raise NoParts("the server sends no parts of files")
    return answer


def _open_other(url: str, start: int, stop: int | None) -> IO[bytes]:
    import fsspec

    protocol = urlsplit(url).scheme
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol, "the package that fsspec names")
        raise UserError(f"{url}: needs a package that is missing: pip install {package}") from error
    except ValueError as error:
        raise UserError(
            f"{url}: {brief(error)}; use https://, s3://, gs:// or another that fsspec knows"
        ) from error
    try:
        if stop is not None and stop - start <= READ_AHEAD:
            return io.BytesIO(system.cat_file(path, start, stop))
        file = system.open(path, "rb", block_size=READ_AHEAD)
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(brief(error)) from error
    file.seek(start)
    return file


def read_pieces(url: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the content of a file from byte `start` up to `stop`, or to its end, going on where a connection broke.

    Raises:
        Refused: if it is not there or may not be read.
        NoParts: if a part was asked for, and there are none to be had.
        OSError: if it could not be read `TRIES` times in a row.
        UserError: if nothing here knows such URLs.
    """
    open_part = _open_http if urlsplit(url).scheme in ("http", "https") else _open_other
    tries = 0
    while stop is None or start < stop:
        try:
            with open_part(url, start, stop) as answer:
                missing = PIECE
                while piece := answer.read(PIECE if stop is None else min(PIECE, stop - start)):
                    start += len(piece)
                    missing -= len(piece)
                    if missing <= 0:
                        tries, missing = 0, PIECE
                    yield piece
                if stop is None and not getattr(answer, "length", None):  # of what an HTTP server has still to send
                    return
                if stop is None or start < stop:
                    raise OSError(f"cut off after {start:,} bytes")
        except (Refused, NoParts, UserError):
            raise
        except Exception as error:  # clients of object stores raise anything
            tries += 1
            if tries == TRIES:
                raise OSError(f"{brief(error)}, {TRIES} times in a row") from error
            time.sleep(_delay_s(tries))


def read(url: str, start: int = 0, stop: int | None = None) -> bytes:
    """Return the content of a file, or a part of it; raises as `read_pieces`."""
    return b"".join(read_pieces(url, start, stop))
