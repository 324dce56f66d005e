"""Log-probs of given token ids from a server, by vLLM's `prompt_logprobs` or by `echo` with `logprobs`.

What comes is checked token by token: as many as were sent, the same ids or texts, numbers that log-probs can be. No
redirect is followed, and no more is read than an answer can hold.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx2
import numpy as np

from posttrain.config.teacher_server import TeacherServer
from posttrain.errors import EngineError

PAUSE = 0.25
"""Seconds between two tries to reach the server."""

GO_ON = "then go on with --resume auto"

_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""

_BYTES = 512
"""More than a token with its text, number and rank takes in an answer."""

_UNREADABLE = "\ufffd"
"""What a part of a character decodes to, which servers complete in ways of their own."""


@dataclass(frozen=True, slots=True)
class ServedRow:
    """What the server says of a row of T tokens; nothing of the first, which no token predicts.

    Attributes:
        logps: (T - 1,) of the tokens of the row.
        top_ids, top_logps: (T - 1, k) the likeliest tokens there, the likeliest first; k is 0 where none are asked for.
    """

    logps: np.ndarray
    top_ids: np.ndarray
    top_logps: np.ndarray


class TeacherClient:
    """Asks a server about rows of ids; may be used from several threads.

    Args:
        server: the recipe's section.
        model: its name there.
        decode: text of one id by the policy's tokenizer.
        vocabulary: number of ids that the teacher knows.
        top_k: likeliest tokens that are asked for; 0 for the row's own tokens alone.
        api_key: sent as bearer token, if any.
        where: the recipe's key of the section.
    """

    def __init__(
        self,
        server: TeacherServer,
        *,
        model: str,
        decode: Callable[[int], str],
        vocabulary: int,
        top_k: int = 0,
        api_key: str | None = None,
        where: str,
    ) -> None:
        self.server, self.model, self.decode, self.vocabulary = server, model, decode, vocabulary
        self.top_k, self.where, self.url = top_k, where, server.url.rstrip("/")
        # Uncompressed, so that what is read is no larger than what was sent.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A redirect would carry the rows, and on some hosts the key, to where nobody meant them to go.
        self._http = httpx2.Client(headers=headers, timeout=server.timeout, follow_redirects=False)

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def check_model(self) -> None:
        """See that the server has the teacher.

        Raises:
            EngineError: it has others, or does not answer.
        """
        found = self._ask("GET", "/models", None, 1 << 20)
        try:
            names = [str(each["id"]) for each in found["data"]]
        except (LookupError, TypeError):
            self._fail(f"{self.url}/models answers in another form: {str(found)[:80]!r}")
        if self.model not in names:
            self._fail(
                f"the server at {self.url} has {', '.join(map(repr, names[:5])) or 'no model'}, not {self.model!r}",
                hint="set served_as to the teacher's name there, or start the server with the teacher",
            )

    def score(self, ids: Sequence[int]) -> ServedRow:
        """What the server says of one row of at least two ids.

        Raises:
            EngineError: it does not answer, or not with what was asked for.
        """
        vllm = self.server.protocol == "vllm"
        how = {"prompt_logprobs": self.top_k} if vllm else {"echo": True, "logprobs": 1}
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, **how}
        room = (1 << 16) + _BYTES * len(ids) * (self.top_k + 2)
        answer = self._ask("POST", "/completions", body, room)
        try:
            if answer.get("model") != self.model:
                self._fail(f"the server at {self.url} answers as {answer.get('model')!r}, not as {self.model!r}")
            choice = answer["choices"][0]
            return self._of_ids(ids, choice["prompt_logprobs"]) if vllm else self._of_texts(ids, choice["logprobs"])
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            self._fail(
                f"an answer of {self.url} without log-probs of the prompt, or in another form "
                f"({type(error).__name__}: {error})",
                hint="protocol: vllm is for vLLM's prompt_logprobs, openai for servers that give echo with logprobs",
            )

    # --------------------------------------------------------------------------------------------- the two forms

    def _of_ids(self, ids: Sequence[int], found: Any) -> ServedRow:
        """Of `prompt_logprobs`: for each token a map of ids to log-prob, rank and text; the token itself is in it."""
        self._count(len(ids), found)
        logps, top_ids, top_logps = [], [], []
        for place, own in enumerate(ids[1:], start=1):
            entries = found[place]
            if str(own) not in entries:
                self._fail(f"the server gives no log-prob of id {own}, the token {place} of a row")
            of_own = entries[str(own)]
            self._same_text(own, of_own.get("decoded_token"))
            logps.append(self._logp(of_own["logprob"]))
            # The token itself comes beside the k likeliest where it is none of them.
            ranked = sorted(((self._logp(each["logprob"]), -int(i)) for i, each in entries.items()), reverse=True)
            if len(ranked) < self.top_k:
                self._fail(f"the server gives {len(ranked)} tokens at token {place} of a row, not {self.top_k}")
            ranked = ranked[: self.top_k]
            if any(not 0 <= -i < self.vocabulary for _, i in ranked):
                self._fail(
                    f"the server knows ids beyond the teacher's {self.vocabulary:,}: it has another tokenizer or model"
                )
            top_ids.append([-i for _, i in ranked])
            top_logps.append([logp for logp, _ in ranked])
        shape = (len(ids) - 1, self.top_k)
        return ServedRow(
            np.asarray(logps, dtype=np.float64),
            np.asarray(top_ids, dtype=np.int64).reshape(shape),
            np.asarray(top_logps, dtype=np.float64).reshape(shape),
        )

    def _of_texts(self, ids: Sequence[int], found: Any) -> ServedRow:
        """Of `echo`: texts and log-probs of the prompt's tokens, and of the one that is generated behind them."""
        texts, values = found["tokens"], found["token_logprobs"]
        self._count(len(ids), values, or_more=1)
        self._count(len(ids), texts, or_more=1)
        for own, text in zip(ids, texts, strict=False):
            self._same_text(own, text)
        empty = np.empty((len(ids) - 1, 0))
        logps = [self._logp(value) for value in values[1 : len(ids)]]
        return ServedRow(np.asarray(logps, dtype=np.float64), empty.astype(np.int64), empty)

    def _count(self, wanted: int, found: Any, or_more: int = 0) -> None:
        if not isinstance(found, list) or not wanted <= len(found) <= wanted + or_more:
            given = len(found) if isinstance(found, list) else "no"
            self._fail(f"the server gives {given} log-probs for a row of {wanted} tokens")

    def _logp(self, value: Any) -> float:
        number = float(value)
        if not math.isfinite(number) or number > 1e-3:
            self._fail(f"the server gives {value!r} as a log-prob")
        return min(number, 0.0)

    def _same_text(self, own: int, text: Any) -> None:
        """The server's word for an id is the policy's; they may differ in the white space around it."""
        mine = self.decode(own)
        if not isinstance(text, str):
            self._fail("the server does not say which tokens it read", hint="start it with its tokenizer")
        if _UNREADABLE in mine or _UNREADABLE in text or text.strip() == mine.strip():
            return
        self._fail(
            f"the server has another tokenizer than the policy: id {own} is {mine!r} here and {text!r} there",
            hint="serve a model with the policy's tokenizer; log-probs of other tokens cannot be compared",
        )

    # ------------------------------------------------------------------------------------------------- the transport

    def _ask(self, method: str, path: str, body: Any, room: int) -> Any:
        lost_since: float | None = None
        while True:
            try:
                status, raw = self._once(method, path, body, room)
                if status == 200:
                    return json.loads(raw)
                what = f"status {status}: {_short(raw)}"
                if status not in _PASSING:
                    self._refused(path, status, what)
            except (httpx2.HTTPError, OSError) as error:
                what = f"{type(error).__name__}: {error}".strip(": ")
            except (ValueError, RecursionError) as error:
                self._fail(f"{self.url}{path} answers in another form ({type(error).__name__})")
            now = time.monotonic()
            lost_since = lost_since or now
            if now - lost_since >= self.server.reconnect:
                hint = f"look into its log, start it again, {GO_ON}"
                self._fail(f"the teacher's server went away ({what}), at {self.url}", hint=hint)
            time.sleep(PAUSE)

    def _once(self, method: str, path: str, body: Any, room: int) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.server.timeout
        content = None if body is None else json.dumps(body).encode()
        with self._http.stream(method, self.url + path, content=content) as response:
            parts, size = [], 0
            for part in response.iter_raw():
                parts.append(part)
                size += len(part)
                if size > room:
                    self._fail(f"{self.url}{path} answers with more than {room:,} bytes, which no such answer has")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {self.server.timeout:g} s")
            return response.status_code, b"".join(parts)

    def _refused(self, path: str, status: int, what: str) -> NoReturn:
        hints = {
            401: "api_key_env names the environment variable that holds the server's key",
            403: "api_key_env names the environment variable that holds the server's key",
            404: "url is the address of the API, mostly with /v1 at its end, and served_as the model's name there",
        }
        hint = hints.get(status, "its log says more")
        if 300 <= status < 400:
            what, hint = f"status {status}, a redirect, and none is followed", "give the address that answers itself"
        elif status == 400 and self.top_k:
            hint = f"vLLM gives so many log-probs where it is started with --max-logprobs {self.top_k}"
        self._fail(f"{self.url}{path} answers with {what}", hint=hint)

    def _fail(self, what: str, *, hint: str = f"look into its log, mend it, {GO_ON}") -> NoReturn:
        raise EngineError(what, where=self.where, hint=hint)


def _short(raw: bytes) -> str:
    return " ".join(raw[:300].decode(errors="replace").split())
