"""Requests to a judge over OpenAI's chat protocol: retries, a cache on disk, a budget."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

from posttrain.errors import VerifierError

MAX_REPLY = 4 << 20
"""Bytes of a reply that are read."""

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""


class JudgeTimeout(Exception):
    """No reply within the limit, in any try."""


class JudgeFailure(Exception):
    """No usable reply, in any try; the message says why.

    Args:
        what: the reason.
        final: a further try would fail too.
        wait: seconds that the endpoint asks to wait.
    """

    def __init__(self, what: str, *, final: bool = False, wait: float = 0.0) -> None:
        super().__init__(what)
        self.final, self.wait = final, wait


class JudgeClient:
    """Sends chat requests; may be used from several threads.

    Args:
        endpoint: base address; `/chat/completions` is added.
        api_key: sent as bearer token, if any.
        timeout: seconds for one try.
        retries: further tries after a failure that may pass.
        backoff: seconds before the first of them; doubled each time. A `Retry-After` of the endpoint is obeyed.
        cache: folder for replies, made if missing; safe for several processes.
        max_requests, max_total_tokens: budget of this process.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        cache: Path | None = None,
        max_requests: int | None = None,
        max_total_tokens: int | None = None,
    ) -> None:
        self.url = endpoint.rstrip("/") + "/chat/completions"
        # Uncompressed, so that what is read is no larger than what was sent.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A redirect would carry the problems, and on some hosts the key, to where nobody meant them to go.
        self._http = httpx2.Client(headers=headers, timeout=timeout, follow_redirects=False)
        self.timeout, self.retries, self.backoff, self.cache = timeout, retries, backoff, cache
        self.max_requests, self.max_total_tokens = max_requests, max_total_tokens
        self.requests = self.total_tokens = 0
        self._lock = threading.Lock()

    def ask(self, body: dict[str, Any]) -> str:
        """The content of the reply's first choice.

        Raises:
            JudgeTimeout, JudgeFailure: no usable reply.
            VerifierError: the budget is used up, or the endpoint refuses such requests (a wrong key, model or address).
        """
        key = self._key(body)
        kept = self._kept(key)
        if kept is not None:
            return kept
        failure: JudgeFailure | JudgeTimeout
        for attempt in range(self.retries + 1):
            try:
                content = self._once(body)
            except JudgeTimeout:
                failure, wait = JudgeTimeout(f"no reply within {self.timeout:g} s, {attempt + 1} times"), 0.0
            except JudgeFailure as error:
                failure, wait = error, error.wait
                if error.final:
                    raise
            else:
                self._keep(key, content)
                return content
            if attempt < self.retries:
                time.sleep(max(self.backoff * 2**attempt, wait))
        raise failure

    def _once(self, body: dict[str, Any]) -> str:
        self._spend()
        deadline = time.monotonic() + self.timeout
        try:
            with self._http.stream("POST", self.url, content=json.dumps(body).encode()) as response:
                raw = _read(response, deadline)
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise JudgeTimeout(f"no reply within {self.timeout:g} s") from error
        except (httpx2.HTTPError, OSError) as error:
            raise JudgeFailure(f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise self._refused(response, raw)
        return self._content(raw)

    def _content(self, raw: bytes) -> str:
        try:
            reply = json.loads(raw)
            content = reply["choices"][0]["message"]["content"]
            used = reply.get("usage") or {}
            tokens = max(0, int(used.get("total_tokens") or 0))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise JudgeFailure(f"a reply of another form: {raw[:80]!r}") from error
        if not isinstance(content, str):
            raise JudgeFailure("a reply without text")
        with self._lock:
            self.total_tokens += tokens
        return content

    def _spend(self) -> None:
        with self._lock:
            for name, used, limit in (
                ("max_requests", self.requests, self.max_requests),
                ("max_total_tokens", self.total_tokens, self.max_total_tokens),
            ):
                if limit is not None and used >= limit:
                    raise VerifierError(
                        f"the judge's budget is used up: {used} of {limit}",
                        where=f"verifier.judge.{name}",
                        hint="raise it and resume; with a `cache` nothing is asked twice",
                    )
            self.requests += 1

    def _refused(self, response: httpx2.Response, raw: bytes) -> Exception:
        status = response.status_code
        what = f"{self.url} answers with status {status}: {raw[:200].decode(errors='replace').strip()}"
        if status in (400, 413, 422):  # this request, perhaps no other: too long, for example
            return JudgeFailure(what, final=True)
        if response.is_redirect:
            return VerifierError(
                f"{self.url} answers with status {status}, a redirect, and none is followed",
                where="verifier.judge.endpoint",
                hint="give the address at which the judge itself answers",
            )
        if status not in _PASSING:
            return VerifierError(what, where="verifier.judge", hint="check `endpoint`, `model` and `api_key_env`")
        wait = response.headers.get("Retry-After", "")
        return JudgeFailure(what, wait=min(float(wait), 60.0) if wait.isascii() and wait.isdigit() else 0.0)

    # ---------------------------------------------------------------------------------------------------- the cache

    def _key(self, body: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()

    def _kept(self, key: str) -> str | None:
        if self.cache is None:
            return None
        try:
            return json.loads((self.cache / key[:2] / f"{key}.json").read_text(encoding="utf-8"))["content"]
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None  # a damaged entry is asked for again

    def _keep(self, key: str, content: str) -> None:
        if self.cache is None:
            return
        folder = self.cache / key[:2]
        folder.mkdir(parents=True, exist_ok=True)
        # Beside and then renamed: other ranks read the same folder.
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"content": content}, file)
        os.replace(name, folder / f"{key}.json")

    def forget(self, body: dict[str, Any]) -> None:
        """Take a reply out of the cache, since nobody can use it."""
        if self.cache is not None:
            key = self._key(body)
            (self.cache / key[:2] / f"{key}.json").unlink(missing_ok=True)


def _read(response: httpx2.Response, deadline: float) -> bytes:
    """The body as it was sent, within the limits of size and time also where it trickles."""
    parts, size = [], 0
    for part in response.iter_raw():
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY:
            raise JudgeFailure(f"a reply of more than {MAX_REPLY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the reply trickles")
    return b"".join(parts)
