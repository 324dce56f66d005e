"""A function or class of the user's own as a verifier, from a file or an installed module."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from posttrain.config.own_code import CodeName, OwnCode, find, in_short, load, user_frames
from posttrain.config.verifier import VerifierConfig
from posttrain.data.encoding import unmarked
from posttrain.data.sample import Problem
from posttrain.errors import VerifierError, nearest
from posttrain.terminal import say
from posttrain.verifiers.verdict import Answer, Form, Status, Verdict

ONE = ("completion", "prompt", "reference", "row", "messages", "token_count", "completion_ids")
"""What a function for one completion may ask for by name, beside columns of the data and its options."""

BATCH = ("completions", "prompts", "reference", "token_count", "completion_ids")
"""The same for a function that takes all completions of a prompt at once: a list each."""

LOGS = ("log_metric", "log_extra")
"""Functions that TRL hands to such a function. Here they write what they are given into the log."""

TRACEBACK = 1500
"""Characters of the first traceback that are kept."""


class PythonVerifier:
    """Calls the user's function, one completion at a time or all completions of a prompt at once, by its signature.

    A function with a parameter `completions` takes lists, as TRL's reward functions do, and returns a list (so does one
    with `prompts` or `completion_ids` and no `completion`); every other
    one takes what it names of `ONE`. Further parameters are options of the recipe, or columns of the data. Either may
    be `async`: completions of a prompt are then awaited together, each under the limit. Of a class the instance is
    called, which is made once per worker, with the options.

    A number is the score, correct from `threshold` on; True and False are 1 and 0; None is no judgement; a `Verdict`
    stands for itself. Anything else, a number that is not finite, and an exception is a crash.

    Where prompts are chat messages, a function with `completions` gets them as TRL gives them: a list of messages each.
    """

    name = "python"
    outcome = True

    class Config(VerifierConfig):
        """A function or class of your own, from a file or an installed module (docs/verifiers.md)."""

        type: Literal["python"] = "python"
        function: CodeName = Field(
            description="`rewards.py:score`, from the recipe's folder, else the working directory; or "
            "`package.module:name`"
        )
        options: dict[str, Any] = Field(
            default_factory=dict, description="its parameters by name; for a class those that make the instance"
        )
        outcome: bool = Field(True, description="judges the outcome; false: only shapes the reward")
        threshold: float = Field(0.5, description="numbers of at least this much count as correct")

        @property
        def judges_outcome(self) -> bool:
            return self.outcome

        @property
        def codes(self) -> list[OwnCode]:
            return [find(self.function)]

    def __init__(self, config: PythonVerifier.Config) -> None:
        self.code = find(config.function)
        self.name, self.outcome = self.code.name, config.outcome
        self.options, self.threshold = config.options, config.threshold
        self._target: Any = None
        self._told = False
        self._loop: asyncio.Runner | None = None

    def prepare(self) -> None:
        """Import the code and make the instance, once per worker.

        Raises:
            VerifierError: it cannot be imported or made, or asks for what nothing gives.
        """
        if self._target is not None:
            return
        try:
            found = getattr(load(self.code.place), self.code.name)
            target = found(**self.options) if inspect.isclass(found) else found
        # Whatever the user's code raises while it is loaded is a mistake in it, to be shown as such.
        except Exception as error:
            raise VerifierError(f"{in_short(error)}\n{_user_frames(error)}".rstrip(), where=str(self.code)) from error
        if not callable(target):
            raise VerifierError("it is no function, and no class whose instances can be called", where=str(self.code))
        options = {} if inspect.isclass(found) else self.options
        self._read_signature(target, options)
        self._target = partial(target, **options)
        # A partial hides it, and an instance with `async def __call__` is no coroutine function itself.
        self._awaits = inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)

    def form(self) -> Form:
        """How it is called. Only after `prepare`."""
        given = (*BATCH, *LOGS) if self._whole else ONE
        return Form(self._whole or self._awaits, tuple(name for name in self._asked if name not in given))

    def judge(self, problem: Problem, answers: Sequence[Answer], limit: float | None) -> Iterator[Verdict]:
        """Verdicts on completions of one problem, in their order, each as soon as it is known.

        Args:
            limit: seconds for one completion, for code that awaits; other code is stopped from outside.
        """
        self.prepare()
        if self._whole:
            yield from self._batch(problem, answers, limit)
        elif self._awaits:
            yield from self._await(self._together(problem, answers, limit))
        else:
            for answer in answers:
                yield self._guarded(partial(self._target, **self._one(problem, answer)))

    # ----------------------------------------------------------------------------------------------------- arguments

    def _read_signature(self, target: Any, options: Mapping[str, Any]) -> None:
        """Find out what it takes."""
        kinds, parameters = inspect.Parameter, inspect.signature(target).parameters
        self._open = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
        named = {n: p for n, p in parameters.items() if p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)}
        for name, parameter in named.items():
            if parameter.kind is kinds.POSITIONAL_ONLY:
                raise VerifierError(f"parameter {name!r} cannot be given by name", where=str(self.code))
        for name in options:
            if name not in named and not self._open:
                raise VerifierError(
                    f"it has no parameter for the option {name!r}", where=str(self.code), hint=nearest(name, named)
                )
        self._names = [name for name in named if name not in options]
        self._asked = [name for name in self._names if named[name].default is kinds.empty]
        # TRL's names of lists; one of its functions may read the tokens alone.
        lists = {"completions"} if "completion" in self._names else {"completions", "completion_ids", "prompts"}
        self._whole = bool(lists & set(self._names))
        if not self._whole and "completion" not in self._names and not self._open:
            raise VerifierError(
                f"it takes ({', '.join(named)}) and neither `completion` nor `completions`",
                where=str(self.code),
                hint=f"name what it reads: {', '.join(ONE)}, or a column; for lists: {', '.join(BATCH)}",
            )

    def _wanted(self, given: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
        """Of everything there is, what the function takes."""
        everything = {**columns, **given}
        names = [name for name in everything if name not in self.options] if self._open else self._names
        return {name: everything[name] for name in names if name in everything}

    def _one(self, problem: Problem, answer: Answer) -> dict[str, Any]:
        given = {
            "completion": answer.text,
            "prompt": _prompt(problem),
            "reference": problem.reference,
            "row": dict(problem.meta),
            "messages": _messages(problem, answer),
            "token_count": answer.tokens,
            "completion_ids": _ids(answer),
        }
        return self._wanted(given, problem.meta)

    def _lists(self, problem: Problem, answers: Sequence[Answer]) -> dict[str, Any]:
        chat = not isinstance(problem.prompt, str)
        texts = [answer.text for answer in answers]
        given = {
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
            "prompts": [_prompt(problem) for _ in answers],
            "reference": [problem.reference] * len(answers),
            "token_count": [answer.tokens for answer in answers],
            "completion_ids": [_ids(answer) for answer in answers],
            **dict.fromkeys(LOGS, _to_the_log),
        }
        return self._wanted(given, {name: [value] * len(answers) for name, value in problem.meta.items()})

    # --------------------------------------------------------------------------------------------------------- calls

    def _batch(self, problem: Problem, answers: Sequence[Answer], limit: float | None) -> list[Verdict]:
        call = partial(self._target, **self._lists(problem, answers))
        try:
            longest = None if limit is None else limit * len(answers)
            values = self._await(_waited(call, longest)) if self._awaits else call()
        except TimeoutError:
            return [Verdict(Status.TIMEOUT, None, "out of time")] * len(answers)
        # See `worker.run_verifier`.
        except Exception as error:
            return [self._crash(error)] * len(answers)
        if hasattr(values, "tolist"):  # an array or a tensor
            values = values.tolist()
        if not isinstance(values, list | tuple) or len(values) != len(answers):
            got = f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__
            return [Verdict(Status.CRASH, None, f"it returned {got} for {len(answers)} completions")] * len(answers)
        return [self._verdict(value) for value in values]

    async def _together(self, problem: Problem, answers: Sequence[Answer], limit: float | None) -> list[Verdict]:
        calls = [_waited(partial(self._target, **self._one(problem, answer)), limit) for answer in answers]
        found = await asyncio.gather(*calls, return_exceptions=True)
        return [self._crash(value) if isinstance(value, Exception) else self._verdict(value) for value in found]

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        """In one loop for all calls, because what an instance keeps open belongs to a loop."""
        self._loop = self._loop or asyncio.Runner()
        return self._loop.run(work)

    def _guarded(self, call: Any) -> Verdict:
        try:
            return self._verdict(call())
        # See `worker.run_verifier`.
        except Exception as error:
            return self._crash(error)

    def _verdict(self, value: Any) -> Verdict:
        if isinstance(value, Verdict):
            return value
        if value is None:
            return Verdict(Status.SKIPPED, None)
        if getattr(value, "ndim", None) == 0:  # a number of numpy's or torch's
            value = value.item()
        if not isinstance(value, bool | int | float):
            return Verdict(Status.CRASH, None, f"it returned {type(value).__name__}, not a number")
        if not math.isfinite(value):
            return Verdict(Status.CRASH, None, f"it returned {value}")
        return Verdict(Status.CORRECT if value >= self.threshold else Status.WRONG, float(value))

    def _crash(self, error: Exception) -> Verdict:
        if isinstance(error, TimeoutError):
            return Verdict(Status.TIMEOUT, None, "out of time")
        traceback.print_exception(error)  # into the log
        detail, self._told = in_short(error) + ("" if self._told else f"\n{_user_frames(error)}"), True
        return Verdict(Status.CRASH, None, detail[:TRACEBACK])


def _ids(answer: Answer) -> list[int] | None:
    return None if answer.ids is None else list(answer.ids)


def _to_the_log(name: str, value: Any) -> None:
    say(f"{name}: {value}")


async def _waited(call: Any, limit: float | None) -> Any:
    return await asyncio.wait_for(call(), limit)


def _prompt(problem: Problem) -> str | list[dict[str, str]]:
    """As the row has it, without the marks of pictures."""
    if isinstance(problem.prompt, str):
        return unmarked(problem.prompt)
    return [message | {"content": unmarked(message["content"])} for message in problem.prompt]


def _messages(problem: Problem, answer: Answer) -> list[dict[str, str]]:
    """The conversation that ends with the completion; a text prompt is what the user said."""
    prompt = _prompt(problem)
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*said, {"role": "assistant", "content": answer.text}]


def _user_frames(error: BaseException) -> str:
    return "".join(traceback.format_list(user_frames(error))).rstrip()
