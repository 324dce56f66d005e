"""Episodes: what a policy and an environment said to each other, turn by turn, and one JSON row for each.

A row holds the text of everything, and the token ids where a policy of ours has acted. Its `messages` are the whole
conversation, so that a file of episodes is a data set of conversations too (`data.completions` with `messages`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from posttrain.bounded_files import MAX_LINE, parse_json, whole_lines
from posttrain.data.encoding import PICTURE
from posttrain.data.sample import Message, Problem
from posttrain.environments.base import Fault, Step
from posttrain.errors import DataError
from posttrain.safe_files import write_text_atomic
from posttrain.verifiers.verdict import Judge, Judgement, Status, Verdict


class Stop(StrEnum):
    """Why an episode ended. The last three are the environment's fault and say nothing of the policy."""

    DONE = "done"
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"
    CUT = "cut"
    GAVE_UP = "gave_up"
    CRASH = Fault.CRASH.value
    TIMEOUT = Fault.TIMEOUT.value
    DIVERGED = Fault.DIVERGED.value

    @property
    def known(self) -> bool:
        """Whether the episode is judged."""
        return self not in (Stop.CRASH, Stop.TIMEOUT, Stop.DIVERGED)


@dataclass(frozen=True, slots=True)
class Turn:
    """One action and what came of it.

    Attributes:
        action: its text, special tokens removed.
        step: the environment's answer; None where it gave none, because the action was cut or the environment failed.
        ids, logps: of the action as it was sampled; empty where an agent acted that has no tokens.
        boundary: ids between this action and the next one, which nobody trains on; empty behind the last.
        replayed: somebody else has acted so before (`Replay`); the action is read and not trained on.
        patch: ids of the action that the policy reads in the place of its own from here on (`Step.patch`); else empty.
    """

    action: str
    step: Step | None = None
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    boundary: tuple[int, ...] = ()
    replayed: bool = False
    patch: tuple[int, ...] = ()

    @property
    def shown(self) -> str:
        """The action as the policy reads it afterwards."""
        return self.action if self.step is None or self.step.patch is None else self.step.patch


@dataclass(frozen=True, slots=True)
class Part:
    """An episode, or a part of one, as one sequence.

    Attributes:
        ids: of prompt, actions and boundaries.
        mask: 1 on the actions that are trained on.
        logps: of these as they were sampled, 0 elsewhere.
        rewards: of the turns that these are.
    """

    ids: list[int]
    mask: list[int]
    logps: list[float]
    rewards: list[float]


@dataclass(frozen=True, slots=True)
class Replay:
    """The beginning of an episode that was recorded: a policy goes on from behind it.

    Attributes:
        turns: its first ones, each with the ids of its action and what the environment answered.
        seed: of its environment.
        opening: what that showed at the beginning.
    """

    turns: tuple[Turn, ...]
    seed: int
    opening: str


@dataclass(slots=True)
class Episode:
    """One problem, played once.

    Attributes:
        problem: as the data source gives it.
        sample: its number among the episodes of the problem.
        seed: of the environment.
        opening: what the environment showed at the beginning.
        prompt: messages before the first action.
        prompt_ids: their ids, with the generation prompt.
        turns: in order.
        stop: why it ended.
        detail: what the environment failed of.
        policy_version: weight syncs of the engine that acted; None for other agents.
        judgement: of verifiers on the last action; None where the environment alone says.
    """

    problem: Problem
    sample: int
    seed: int
    opening: str = ""
    prompt: tuple[Message, ...] = ()
    prompt_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    stop: Stop | None = None
    detail: str = ""
    policy_version: int | None = None
    judgement: Judgement | None = None

    @property
    def steps(self) -> list[Step]:
        """The environment's answers."""
        return [turn.step for turn in self.turns if turn.step is not None]

    @property
    def total(self) -> float:
        """The return: the sum of all rewards."""
        return sum((step.reward for step in self.steps), start=0.0)

    @property
    def reward(self) -> float | None:
        """What is optimised: the return, and what verifiers gave; None if one of them could not judge, or unknown."""
        if self.stop is None or not self.stop.known:
            return None
        given = 0.0 if self.judgement is None else self.judgement.reward
        return None if given is None else self.total + given

    @property
    def acted(self) -> list[Turn]:
        """The turns that are not replayed."""
        return [turn for turn in self.turns if not turn.replayed]

    @property
    def turn_rewards(self) -> list[float]:
        """The reward of each action that is not replayed, the last one's with what verifiers gave."""
        rewards = [0.0 if turn.step is None else turn.step.reward for turn in self.acted]
        if rewards and self.judgement is not None and self.judgement.reward is not None:
            rewards[-1] += self.judgement.reward
        return rewards

    @property
    def outcome(self) -> float | None:
        """1 solved, 0 not, by a verifier or else the environment; None if unknown.

        The return stands for it where an episode is done and its environment does not say. What our limits ended was
        not solved.
        """
        if self.stop is None or not self.stop.known:
            return None
        if self.judgement is not None:
            return self.judgement.outcome
        if self.stop is not Stop.DONE:
            return 0.0
        success = self.steps[-1].success
        return self.total if success is None else float(success)

    @property
    def status(self) -> Status:
        """The word for the outcome."""
        if self.stop is None or not self.stop.known:
            return Status.TIMEOUT if self.stop is Stop.TIMEOUT else Status.CRASH
        if self.judgement is not None:
            return self.judgement.status
        return Status.CORRECT if self.outcome >= 1.0 else Status.WRONG

    @property
    def parts(self) -> list[Part]:
        """The sequences that it is trained on as; each action is in one of them.

        Where the environment has changed the history, the action that was taken ends a sequence, and the next one
        begins with the other action, as the policy has read it. Without a turn it is the prompt alone.
        """
        found, rewards = [], iter(self.turn_rewards)
        part = Part(list(self.prompt_ids), [0] * len(self.prompt_ids), [0.0] * len(self.prompt_ids), [])
        for turn in self.turns:
            start = len(part.ids)
            _append(part, turn.ids, None if turn.replayed else turn.logps)
            if not turn.replayed:
                part.rewards.append(next(rewards))
            if turn.patch:
                found.append(part)
                part = Part(part.ids[:start], [0] * start, [0.0] * start, [])
                _append(part, turn.patch, None)
            _append(part, turn.boundary, None)
        return [*found, part] if part.rewards or not found else found

    @property
    def ids(self) -> list[int]:
        """All token ids as the policy has read them: prompt, action, boundary, action, ..."""
        return self.parts[-1].ids

    @property
    def mask(self) -> list[int]:
        """As long as `ids`: 1 on actions that are trained on there."""
        return self.parts[-1].mask

    @property
    def logps(self) -> list[float]:
        """As long as `ids`: log-probs of these as they were sampled, 0 elsewhere."""
        return self.parts[-1].logps

    def messages(self) -> list[Message]:
        """The conversation up to the last action."""
        found = [dict(message) for message in self.prompt]
        for turn in self.turns:
            found.append({"role": "assistant", "content": turn.shown})
            if turn is self.turns[-1] or turn.step is None:
                continue
            told = [{"role": "tool", "name": name, "content": text} for name, text in turn.step.results]
            found += told or [{"role": "user", "content": turn.step.observation}]
        return found

    def row(self) -> dict[str, Any]:
        """The JSON values of a line."""
        return {
            "problem": _problem_row(self.problem),
            "sample": self.sample,
            "seed": self.seed,
            "opening": self.opening,
            "messages": self.messages(),
            "turns": [_turn_row(turn) for turn in self.turns],
            "prompt_ids": self.prompt_ids,
            "stop": None if self.stop is None else self.stop.value,
            "detail": self.detail,
            "return": self.total,
            "reward": self.reward,
            "outcome": self.outcome,
            "verdict": self.status.value,
            "judged": self.judgement is not None,
        }


def _problem_row(problem: Problem) -> dict[str, Any]:
    row: dict[str, Any] = {"id": problem.id, "prompt": problem.prompt, "meta": problem.meta}
    row |= {} if problem.reference is None else {"reference": problem.reference}
    return row | ({"tools": list(problem.tools)} if problem.tools else {})


def _append(part: Part, ids: Sequence[int], logps: Sequence[float] | None) -> None:
    """Put tokens at the end, trained on where they have log-probs."""
    part.ids.extend(ids)
    part.mask.extend([0 if logps is None else 1] * len(ids))
    part.logps.extend([0.0] * len(ids) if logps is None else logps)


def judge_episodes(judge: Judge, episodes: Sequence[Episode]) -> None:
    """Have verifiers judge the last action of every episode that is known and has one."""
    asked = [episode for episode in episodes if episode.stop is not None and episode.stop.known and episode.turns]
    last = [episode.turns[-1] for episode in asked]
    judgements = judge.judge(
        [episode.problem for episode in asked],
        [turn.action for turn in last],
        [len(turn.ids) for turn in last],
        [turn.ids for turn in last],
    )
    for episode, judgement in zip(asked, judgements, strict=True):
        episode.judgement = judgement


def _turn_row(turn: Turn) -> dict[str, Any]:
    step = turn.step
    said = {} if step is None else {"observation": step.observation, "reward": step.reward, "done": step.done}
    said |= {} if step is None else {"success": step.success, "valid": step.valid}
    said |= {"patch": step.patch} if step is not None and step.patch is not None else {}
    said |= {"results": [list(result) for result in step.results]} if step is not None and step.results else {}
    ids = {"ids": list(turn.ids), "logps": list(turn.logps), "boundary": list(turn.boundary)} if turn.ids else {}
    ids |= {"patch_ids": list(turn.patch)} if turn.patch else {}
    return {"action": turn.action, **said, **ids} | ({"replayed": True} if turn.replayed else {})


def write_episodes(path: Path, episodes: Iterable[Episode]) -> None:
    """A file of episodes, a line each, with their pictures beside it."""
    lines = []
    for episode in episodes:
        row = episode.row()
        if texts := _pictured(row):
            from posttrain.data.pictures import folder_beside, put_beside

            put_beside(texts, folder_beside(path))
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))


def _pictured(row: dict[str, Any]) -> list[str]:
    """The texts of an episode that have pictures."""
    said = [*row["messages"], {"content": row["problem"]["prompt"]}, {"content": row["opening"]}]
    said += [{"content": turn.get("observation")} for turn in row["turns"]]
    return [text for each in said if isinstance(text := each["content"], str) and PICTURE in text]


def holds_episodes(path: Path) -> bool:
    """Whether the first line of a file is that of an episode."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as lines:
        try:
            row = json.loads(lines.readline(MAX_LINE) or "null")
        except (ValueError, RecursionError):
            return False
    return isinstance(row, dict) and {"problem", "seed", "opening", "turns", "stop"} <= row.keys()


def read_episodes(path: Path) -> Iterator[Episode]:
    """The episodes of a file.

    Raises:
        DataError: a missing file, or a line that is no episode.
    """
    if not path.is_file():
        raise DataError("there is no such file", where=str(path))
    for line, where in whole_lines(path, unfinished=True):
        try:
            row = parse_json(line, where)
            if texts := _pictured(row):
                from posttrain.data.pictures import folder_beside, take_back

                take_back(texts, folder_beside(path), where)
            yield _episode(row, where)
        except (ValueError, TypeError, LookupError) as error:
            hint = "posttrain play --out FILE writes episodes"
            raise DataError(f"not an episode: {error}", where=where, hint=hint) from error


def _episode(row: dict[str, Any], where: str) -> Episode:
    written = row["problem"]
    prompt, tools = _prompt(written["prompt"]), tuple(written.get("tools", ()))
    problem = Problem(written["id"], prompt, written.get("reference"), written["meta"], where, tools=tools)
    episode = Episode(problem, row["sample"], row["seed"], row["opening"], stop=Stop(row["stop"]), detail=row["detail"])
    episode.turns = [_turn(turn) for turn in row["turns"]]
    said = len(episode.messages())  # of the turns alone
    episode.prompt = tuple(row["messages"][: len(row["messages"]) - said])
    episode.prompt_ids = row["prompt_ids"]
    if row.get("judged"):
        verdict = Verdict(Status(row["verdict"]), row["outcome"])
        given = None if row["reward"] is None else row["reward"] - episode.total
        episode.judgement = Judgement({"recorded": verdict}, row["outcome"], given)
    return episode


def _turn(row: dict[str, Any]) -> Turn:
    ids, logps, boundary = (tuple(row.get(name, ())) for name in ("ids", "logps", "boundary"))
    if len(ids) != len(logps):
        raise ValueError(f"{len(ids)} ids but {len(logps)} log-probs")
    patch = tuple(row.get("patch_ids", ()))
    return Turn(row["action"], _step(row), ids, logps, boundary, row.get("replayed", False), patch)


def _prompt(written: str | Sequence[Message]) -> str | tuple[Message, ...]:
    return written if isinstance(written, str) else tuple(written)


def _step(turn: dict[str, Any]) -> Step | None:
    if "observation" not in turn:
        return None
    told = {name: turn[name] for name in ("observation", "reward", "done", "success", "valid")}
    results = tuple((name, text) for name, text in turn.get("results", ()))
    return Step(**told, results=results, patch=turn.get("patch"))
