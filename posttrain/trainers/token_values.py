"""`tokens.jsonl`: a few sequences of a run token by token, for the report: how likely each token was, how far training
moved it, and what it was credited with.

The values are those of the forward pass that trains, so nothing is computed for them. A run keeps them up to a budget
(`tracking.token_values`), spread evenly over its steps. Held-out pairs come besides, the first of them at each
evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Sample
from posttrain.evaluation.preferences import RowScorer
from posttrain.evaluation.token_rewards import text_pieces
from posttrain.models.collate import Tensors
from posttrain.tracking.thumbnails import keep_thumbnails
from posttrain.tracking.transcript import Transcript

FILE = "tokens.jsonl"

AT_ONCE = 512
"""Tokens of one step, at most; a sequence that is longer than what is left of them is cut."""

PLACE = "place"
"""(B,) int64 tensor of a micro-batch: which of the rows in `samples.jsonl` each one is; -1: its tokens are not kept."""

_DIGITS = 4


class TokenValues:
    """Writes the values of some sequences.

    Args:
        run_dir: folder of the run.
        budget: tokens of the whole run; 0 keeps none.
        steps: of the run.
        renderer: of the policy.
    """

    def __init__(self, run_dir: Path, budget: int, steps: int, renderer: Renderer) -> None:
        self.at_once = min(AT_ONCE, budget)
        self.every = ceil(steps / max(1, budget // AT_ONCE))
        self.transcript, self.renderer = Transcript(run_dir / FILE), renderer

    def wanted(self, step: int, steps: int = 1) -> bool:
        """Whether those of this step are kept, or of the rollout that these steps train on."""
        return self.at_once > 0 and -step % self.every < steps

    def watched(self, step: int, steps: int, rows: Sequence[Sample]) -> int:
        """How many of the first rows of a rollout are kept: of the first group, which `write_first_group` shows, and
        those that fit; the first one in any case.

        Args:
            step, steps: the first step that trains on the rollout, and how many do.
            rows: of this rank.
        """
        if not self.wanted(step, steps):
            return 0
        room = self.at_once
        for place, row in enumerate(rows):
            room -= len(row.ids) - row.prompt_length
            if row.group != rows[0].group or (room < 0 and place > 0):
                return place
        return len(rows)

    def write_rows(self, step: int, rollout: int, inputs: Tensors, logps: Tensor) -> None:
        """Those of the rows of a micro-batch that have a place.

        Args:
            step: optimizer step, from 0.
            rollout: the step at which the rows were written into `samples.jsonl`.
            inputs: of the forward pass.
            logps: (B, T) under the policy that is trained.
        """
        old = inputs.get("old_logps", inputs.get("behaviour_logps"))
        for row in ((inputs[PLACE] >= 0) & inputs["mask"].any(dim=1)).nonzero().flatten().tolist():
            advantage = inputs["advantages"][row]
            values = {
                "ratio": None if old is None else (logps[row] - old[row]).exp(),
                "ratio_to_reference": (logps[row] - inputs["ref_logps"][row]).exp() if "ref_logps" in inputs else None,
                "advantage": advantage.expand(logps.size(1)) if advantage.dim() == 0 else advantage,
                "value": inputs["old_values"][row] if "old_values" in inputs else None,
            }
            tokens = self._sequence(inputs, row, self.at_once, {"logp": logps[row], **values})
            self.transcript.write(step, {"rollout": rollout, "place": int(inputs[PLACE][row]), **tokens})

    def write_responses(self, step: int, inputs: Tensors, roles: Sequence[str], logps: Tensor) -> None:
        """The responses of the first rows of a micro-batch, until the room is used up.

        Args:
            step: optimizer step, from 0.
            inputs: of the forward pass, role by role.
            roles: R of them.
            logps: (R * rows, T) under the policy that is trained.
        """
        size, room, reference = len(logps) // len(roles), self.at_once, inputs.get("ref_logps")
        gains = logps if reference is None else logps - reference
        for row in range(size):
            mask = inputs["mask"][row]
            prompt = inputs["ids"][row, : int(mask.int().argmax())] if bool(mask.any()) else inputs["ids"][row, :0]
            entry: dict[str, Any] = {"prompt": self.renderer.encoder.text(prompt.tolist(), special=True)}
            if self.renderer.pictures is not None:
                keep_thumbnails(self.renderer.pictures, prompt.tolist(), self.transcript.path.parent)
            sums = {}
            for number, role in enumerate(roles):
                place = number * size + row
                reward = None if reference is None else gains[place]
                part = room // (len(roles) - number)
                entry[role] = self._sequence(inputs, place, part, {"logp": logps[place], "reward": reward})
                sums[role] = float((gains[place] * inputs["mask"][place]).sum())
                room -= len(entry[role]["text"])
            if {"chosen", "rejected"} <= set(sums):
                entry["margin"] = _rounded(sums["chosen"] - sums["rejected"])
            self.transcript.write(step, entry)
            if room <= 0:
                return

    def write_held_out(self, step: int, pairs: Sequence[Mapping[str, tuple[Sample, Tensor]]], score: RowScorer) -> None:
        """The first held-out pairs, the same ones each time, as many as there is room for.

        Args:
            step: optimizer steps done.
            pairs: role -> sequence and its (T,) log-probs under the start.
            score: by the policy.
        """
        room, samples = self.at_once, [sample for pair in pairs for sample, _ in pair.values()]
        scored = iter(score(samples) if room else [])
        for pair in pairs:
            if room <= 0:
                return
            entry: dict[str, Any] = {"held_out": step, "margin": 0.0}
            for role, (sample, start) in pair.items():
                logps = next(scored)
                inputs = {"ids": torch.tensor([sample.ids]), "mask": torch.tensor([sample.loss_mask]).bool()}
                entry["prompt"] = self.renderer.encoder.text(sample.ids[: sample.prompt_length], special=True)
                part = room // (2 if role == "chosen" else 1)
                entry[role] = self._sequence(inputs, 0, part, {"logp": logps, "reward": logps - start})
                entry["margin"] += float((logps - start).sum()) * (1 if role == "chosen" else -1)
                room -= len(entry[role]["text"])
            # What was measured after a step belongs to it: `step` is the number of the next one.
            self.transcript.write(max(step - 1, 0), entry | {"margin": _rounded(entry["margin"])})

    def _sequence(self, inputs: Tensors, row: int, room: int, values: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """From the first trained token to the last; values of those between, which were not, are null."""
        mask = inputs["mask"][row]
        trained = mask.nonzero().flatten().tolist()
        if not trained:
            return {"text": [], "trained": []}
        part = slice(trained[0], min(trained[-1] + 1, trained[0] + max(room, 1)))
        flags = mask[part].tolist()
        found: dict[str, Any] = {
            "text": self._pieces(inputs["ids"][row, part].tolist()),
            "trained": [int(flag) for flag in flags],
        }
        for name, value in values.items():
            if value is not None:
                numbers = zip(value[part].detach().float().tolist(), flags, strict=True)
                found[name] = [_rounded(number) if flag else None for number, flag in numbers]
        return found | ({"cut": trained[-1] + 1 - part.stop} if part.stop <= trained[-1] else {})

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; the first place of a picture shows it, the others nothing."""
        if self.renderer.pictures is None:
            return text_pieces(self.renderer.tokenizer, ids)
        from posttrain.data.picture_text import FIRST, shown

        pieces: list[str] = []
        for seeing, run in groupby(ids, key=lambda token: token >= FIRST):
            if not seeing:
                pieces += text_pieces(self.renderer.tokenizer, list(run))
                continue
            for token in run:
                seen = self.renderer.pictures.of_id(token)
                pieces.append(shown(seen) if token == seen.first else "")
        return pieces


def _rounded(number: float) -> float | None:
    """To so many digits; null where it is not finite, which JSON has no other word for."""
    return float(f"{number:.{_DIGITS}g}") if abs(number) < float("inf") else None
