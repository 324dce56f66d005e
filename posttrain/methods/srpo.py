"""SRPO: one network as generator and as reviser of an earlier answer, by two squared losses on log-ratios."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator

from posttrain.config.needs import Needs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Message, Preference, Problem, Sample
from posttrain.errors import DataError
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.preference import srpo_losses
from posttrain.objectives.sequences import log_ratios

_PLACEHOLDER = re.compile(r"\{(prompt|answer)\}")
REVISIONS = [("chosen", "rejected"), ("rejected", "rejected"), ("chosen", "chosen"), ("rejected", "chosen")]
"""(answer, earlier answer) of the four revision sequences; the role is `answer|earlier`."""


class SRPOConfig(MethodConfig):
    name: Literal["srpo"] = "srpo"
    beta: float = Field(
        0.01, gt=0, description="weight of the KL; a public re-implementation's value (the paper's is not known to us)"
    )
    alpha: float = Field(
        0.8, ge=0, le=1, description="share of the reviser's loss; from the same re-implementation as beta"
    )
    revision_template: str = Field(
        "{prompt}\n\nEarlier answer:\n{answer}\n\nBetter answer:\n",
        description="prompt of the reviser, with {prompt} and {answer}; in a chat it replaces the last user message",
    )

    @field_validator("revision_template")
    @classmethod
    def _both_placeholders(cls, value: str) -> str:
        missing = {"{prompt}", "{answer}"} - {match.group() for match in _PLACEHOLDER.finditer(value)}
        if missing:
            raise ValueError(f"revision_template has no {' and no '.join(sorted(missing))}")
        return value


class SRPO(PairMethod[SRPOConfig]):
    """Roles: `chosen`, `rejected`, and `answer|earlier` for the four revisions."""

    Config = SRPOConfig
    paper = "Self-Improving Robust Preference Optimization, arXiv 2406.01660"

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",), reference=True)

    def responses(self, row: Preference, renderer: Renderer) -> dict[str, Sample]:
        found = super().responses(row, renderer)
        answers = {"chosen": row.chosen, "rejected": row.rejected}
        for answer, earlier in REVISIONS:
            problem = revision(row.problem, answers[earlier], self.config.revision_template)
            found[f"{answer}|{earlier}"] = renderer.sample(Example(problem, answers[answer]))
        return found

    def compare(self, rows: PreferenceBatch) -> Compared:
        c = self.config
        rho_w, rho_l = (log_ratios(rows.responses[role]) for role in ("chosen", "rejected"))
        revised = [log_ratios(rows.responses[f"{answer}|{earlier}"]) for answer, earlier in REVISIONS]
        generator, reviser = srpo_losses(rho_w, rho_l, *revised, c.beta)
        further = {"srpo/generator_loss": generator.detach(), "srpo/reviser_loss": reviser.detach()}
        losses = (1 - c.alpha) * generator + c.alpha * reviser
        return Compared(losses, (c.beta * rho_w, c.beta * rho_l), further=further)


def revision(problem: Problem, answer: str | tuple[Message, ...], template: str) -> Problem:
    """The problem of improving on an earlier answer.

    Raises:
        DataError: the answer has several turns, or the prompt does not end with a user message.
    """
    text = _single_turn(answer, problem.where)
    if isinstance(problem.prompt, str):
        return replace(problem, prompt=_filled(template, problem.prompt, text))
    *before, last = problem.prompt
    if last["role"] != "user":
        raise DataError(
            f"a prompt to be revised must end with the user's message, not {last['role']}'s", where=problem.where
        )
    return replace(problem, prompt=(*before, {**last, "content": _filled(template, last["content"], text)}))


def _single_turn(answer: str | tuple[Message, ...], where: str) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise DataError(f"an answer of {len(answer)} messages cannot be put into the revision prompt", where=where)
    return answer[0]["content"]


def _filled(template: str, prompt: str, answer: str) -> str:
    values = {"prompt": prompt, "answer": answer}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
