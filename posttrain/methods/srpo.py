"""SRPO: one network as generator and as reviser of an earlier answer, by two squared losses on log-ratios."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.revisions import RevisionTemplate
from posttrain.data.rendering import Renderer
from posttrain.data.revisions import revision
from posttrain.data.sample import Example, Preference, Sample
from posttrain.methods.base import MethodConfig, Metric
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.preference import srpo_losses
from posttrain.objectives.sequences import log_ratios

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
    revision_template: RevisionTemplate = Field(
        "{prompt}\n\nEarlier answer:\n{answer}\n\nBetter answer:\n",
        description="prompt of the reviser, with {prompt} and {answer}; in a chat it replaces the last user message",
    )


class SRPO(PairMethod[SRPOConfig]):
    """Roles: `chosen`, `rejected`, and `answer|earlier` for the four revisions."""

    Config = SRPOConfig
    paper = "Self-Improving Robust Preference Optimization, arXiv 2406.01660"
    metrics = (
        Metric("srpo/generator_loss", "Squared loss of SRPO's generator, before its weight.", "1"),
        Metric("srpo/reviser_loss", "Squared loss of SRPO's reviser, before its weight.", "1"),
    )

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
        generator, reviser = srpo_losses(rho_w, rho_l, revised[0], revised[1], revised[2], revised[3], c.beta)
        further = {"srpo/generator_loss": generator.detach(), "srpo/reviser_loss": reviser.detach()}
        losses = (1 - c.alpha) * generator + c.alpha * reviser
        return Compared(losses, (c.beta * rho_w, c.beta * rho_l), further=further)
