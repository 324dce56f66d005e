"""A teacher that a server holds: where it answers, and in which form it gives log-probs of token ids."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.addresses import Address
from posttrain.config.keys import KeyName
from posttrain.config.section import Section


class TeacherServer(Section):
    """The server that says what the teacher thinks; of its folder or Hub id only tokenizer and config.json are read."""

    url: Address = Field(description="address of the API, such as http://10.0.0.5:8000/v1; /completions is asked")
    served_as: str | None = Field(
        None, min_length=1, description="the model's name there; default: the teacher's folder or Hub id"
    )
    protocol: Literal["vllm", "openai"] = Field(
        "vllm",
        description="vllm: `prompt_logprobs`, tokens by ids; openai: `echo` with `logprobs`, for the sampled token",
    )
    api_key_env: KeyName | None = Field(
        None,
        description="environment variable with the server's key; default: the one that launch/vllm_server.sh made, for "
        "a server on this machine",
    )
    requests: int = Field(16, ge=1, description="rows that are asked for at once, by each rank")
    timeout: float = Field(600.0, gt=0, description="seconds for one row")
    reconnect: float = Field(30.0, ge=0, description="seconds for which a server that cannot be reached is tried again")
    canary_limit: float = Field(
        0.1,
        gt=0,
        description="nats by which the log-probs of some fixed tokens may differ, on average, from those at the start",
    )
