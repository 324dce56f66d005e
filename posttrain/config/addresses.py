"""Addresses of servers. A recipe is written into the run's folder and shown, so they must hold no secret."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

_ADDRESS = re.compile(r"https?://[^/@?#\s]+(?:/[^@?#\s]*)?")


def _without_secret(text: str) -> str:
    if re.search(r"[@?#]", text):
        raise ValueError(
            "the address has a user, a password or parameters, and would be written into the run's folder; name an "
            "environment variable with the key as `api_key_env` instead"
        )
    if not _ADDRESS.fullmatch(text) or not text.isprintable():
        raise ValueError("expected an address such as http://localhost:8000/v1")
    if _is_of_the_machines_own_services(urlsplit(text).hostname or ""):
        raise ValueError("this is where a cloud hands out the machine's credentials, and no model answers there")
    return text


def _is_of_the_machines_own_services(host: str) -> bool:
    """Whether it is a link-local address, in any of the ways of writing one, or a name of such a service."""
    if host.rstrip(".") in ("metadata", "metadata.google.internal", "instance-data"):
        return True
    try:
        # Also 2852039166, 0xa9fea9fe and 0251.0376.0251.0376, as the system resolves them.
        address = ipaddress.ip_address(host.partition("%")[0] if ":" in host else socket.inet_aton(host))
    except (OSError, ValueError):
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_link_local


def is_called(host: str, names: set[str]) -> bool:
    """Whether a `Host` header calls a server by an address or one of its own names, at whichever port.

    A web page reaches a server of this machine by a name of its own that it has lead to this address.
    """
    name = re.sub(r":\d+$", "", host.lower()).removesuffix(".")
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name in names
    return True


Address = Annotated[str, AfterValidator(_without_secret)]
