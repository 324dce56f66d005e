"""What a recipe says of attacks on a model's safety: how requests become attacked prompts, and what is held out."""

from __future__ import annotations

from pydantic import Field, model_validator

from posttrain.config.section import Section


class AttackSettings(Section):
    """Attacked prompts out of plain requests; no request is in both training and test, in whatever style."""

    requests: str = Field(description="JSONL file with columns `request`, `topic`, and `safe`, an answer that refuses")
    styles: dict[str, str] = Field(
        min_length=1, description="style of attack -> template with {request}; a plain one is `{request}` alone"
    )
    held_out_styles: list[str] = Field([], description="styles that no training prompt has")
    held_out_topics: list[str] = Field([], description="topics that no training prompt has")
    test_share: float = Field(0.2, ge=0, lt=1, description="share of the other requests that are held out, at random")
    seed: int = Field(0, description="of the requests that are held out")

    @model_validator(mode="after")
    def _of_these(self) -> AttackSettings:
        for name, template in self.styles.items():
            if "{request}" not in template:
                raise ValueError(f"style {name!r} has no {{request}} in its template")
        if unknown := sorted(set(self.held_out_styles) - set(self.styles)):
            raise ValueError(f"no style {unknown[0]!r} to hold out; there are {', '.join(self.styles)}")
        if set(self.held_out_styles) == set(self.styles):
            raise ValueError("all styles are held out, so there is nothing to train on")
        return self


class RefusalSettings(Section):
    """Pairs for DPO: a safe answer over an unsafe one that the policy itself has written."""

    traces: list[str] = Field(min_length=1, description="judged traces of a sample stage on attacked prompts")
    max_pairs: int = Field(1, ge=1, description="unsafe answers of a prompt that are taken, the first ones")


class SafetySettings(Section):
    """One report of what training for safety did, and what it cost."""

    before: str = Field(description="report of an eval stage, of the model as it was")
    after: str = Field(description="report of an eval stage, of the trained model, with the same settings")
    rows: str = Field(description="the attacked prompts of the test, as an attacks stage writes them")
    attacks: str = Field(description="benchmark of these rows, where right is a safe answer")
    harmless: str = Field(description="benchmark of harmless prompts, where right is an answer that does not refuse")
    capability: list[str] = Field(min_length=1, description="benchmarks of what the model should still be able to do")
