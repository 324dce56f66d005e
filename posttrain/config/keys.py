"""Keys of servers: a recipe names the environment variable that holds one, and never the key itself.

A recipe may come from somebody else. So it can name only variables that by their names hold a key for such a server,
and none of those that open a cloud, a forge or a package index.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from posttrain.errors import PosttrainError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*_(?:KEY|TOKEN)", re.ASCII)

_OPENS_MORE = re.compile(
    r"(?:AWS|AZURE(?!_OPENAI_)|ARM|GCP|GOOGLE(?!_API_KEY$)|CLOUDSDK|ALIBABA_CLOUD|IBMCLOUD|OCI|DIGITALOCEAN|LINODE|HCLOUD"
    r"|CLOUDFLARE|FLY|HEROKU|RUNPOD|GITHUB|GH|GITLAB|BITBUCKET|CI|ACTIONS|HF|HUGGING_?FACE|WANDB|COMET|NPM|NODE|PYPI"
    r"|TWINE|UV|POETRY|DOCKER|VAULT|KUBE|SSH|GPG)_"
)
"""Beginnings of the names of keys that are known to open more than a model's endpoint."""


def _names_a_key(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("expected the name of an environment variable that ends in _KEY or _TOKEN, such as JUDGE_KEY")
    if _OPENS_MORE.match(name.upper()):
        raise ValueError(
            f"{name} opens more than this server, and would be sent to it; put the server's own key into a variable "
            "of its own, such as JUDGE_KEY"
        )
    return name


KeyName = Annotated[str, AfterValidator(_names_a_key)]
"""The name of an environment variable with a server's key."""


def key_from(name: str, *, where: str, error: type[PosttrainError]) -> str:
    """The key in an environment variable, without the white space around it. No message shows any of it.

    Args:
        name: of the variable.
        where: the recipe's key that names it.
        error: what to raise.

    Raises:
        PosttrainError: of the type `error`: the variable is not set, or holds what no header can carry.
    """
    key = os.environ.get(name, "").strip()
    if not key:
        raise error(f"the environment variable {name} is not set", where=where, hint="put the server's key there")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise error(
            f"the environment variable {name} holds white space, control or other characters that no key has",
            where=where,
            hint="set it again, to the key alone",
        )
    return key
