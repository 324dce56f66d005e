"""Addresses of servers. A recipe is written into the run's folder and shown, so they must hold no secret."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_ADDRESS = re.compile(r"https?://[^/@?#\s]+(?:/[^@?#\s]*)?")


def _without_secret(text: str) -> str:
    if re.search(r"[@?#]", text):
        raise ValueError(
            "the address has a user, a password or parameters, and would be written into the run's folder; name an "
            "environment variable with the key as `api_key_env` instead"
        )
    if not _ADDRESS.fullmatch(text):
        raise ValueError("expected an address such as http://localhost:8000/v1")
    return text


Address = Annotated[str, AfterValidator(_without_secret)]
