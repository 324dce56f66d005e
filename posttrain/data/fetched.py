"""Pictures from the network, from hosts that the recipe names (`image_hosts`): within bounds of size and time.

A row can name any address, also one within the network of the machine that trains. So nothing is asked of a host that
is not named, redirections included, and no more is read than a picture may have.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import httpx2

from posttrain.errors import DataError

SECONDS = 30.0
"""For a whole picture; of waiting for the next piece of it a third."""

REDIRECTIONS = 3


def fetched(address: str, hosts: Sequence[str], most: int, where: str) -> bytes:
    """What stands at an address.

    Args:
        address: begins with `http://` or `https://`.
        hosts: that may be asked, as they stand in addresses, with the port where there is one.
        most: bytes.
        where: the row.

    Raises:
        DataError: another host, an answer that is none, too many bytes, or too slow.
    """
    until = time.monotonic() + SECONDS
    try:
        with httpx2.Client(timeout=SECONDS / 3, follow_redirects=False) as client:
            for _ in range(REDIRECTIONS + 1):
                _check_host(address, hosts, where)
                with client.stream("GET", address) as answer:
                    if answer.is_redirect and (following := answer.headers.get("location")):
                        address = str(httpx2.URL(address).join(following))
                        continue
                    answer.raise_for_status()
                    return _read(answer, most, until, where)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        what = str(error).strip() or type(error).__name__
        raise DataError(f"the picture could not be fetched: {what[:200]}", where=where) from error
    raise DataError(f"the address leads to more than {REDIRECTIONS} others: {address[:80]!r}", where=where)


def _check_host(address: str, hosts: Sequence[str], where: str) -> None:
    asked = httpx2.URL(address)
    if asked.scheme not in ("http", "https") or asked.netloc.decode() not in hosts:
        raise DataError(
            f"pictures are not fetched from {address[:80]!r}",
            where=where,
            hint=f"hosts that the source names: {', '.join(hosts)}",
        )


def _read(answer: httpx2.Response, most: int, until: float, where: str) -> bytes:
    held = bytearray()
    for piece in answer.iter_bytes():
        held += piece
        if len(held) > most:
            raise DataError(f"the picture has more than {most // 2**20} MiB", where=where)
        if time.monotonic() > until:
            raise DataError(f"the picture did not come within {SECONDS:g} seconds", where=where)
    return bytes(held)
