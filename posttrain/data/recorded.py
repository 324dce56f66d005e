"""Episodes of files as traces: conversations to train on, and beginnings that a policy goes on from.

The trained tokens are the actions. An episode that a model of ours has played keeps its own ids where they are what the
tokenizer and the chat template of today make of the same text; any other one is rendered from its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from posttrain.data.episodes import Episode, Replay, Turn
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Sample
from posttrain.data.traces import Trace


def example_of(episode: Episode) -> Example:
    """The conversation: the prompt with what the environment showed at the beginning, and all that followed.

    An action that the environment has not answered, because it was cut, is left out.
    """
    played = _played(episode)
    problem = replace(episode.problem, prompt=episode.prompt)
    return Example(problem, tuple(played.messages()[len(episode.prompt) :]))


def trace_of(episode: Episode) -> Trace:
    """What is known of an episode as of any trace."""
    return Trace(
        problem_id=episode.problem.id,
        sample=episode.sample,
        prompt=episode.prompt,
        text="\n".join(turn.action for turn in _played(episode).turns),
        policy="",
        manifest="",
        reference=episode.problem.reference,
        meta=episode.problem.meta,
        verdict=episode.status.value,
        outcome=episode.outcome,
        reward=episode.reward,
    )


def own_sample(episode: Episode, rendered: Sample, renderer: Renderer) -> Sample:
    """`rendered` with the ids and log-probs that were sampled, where they say the same."""
    played = _played(episode)
    if not episode.prompt_ids or not all(turn.ids and not turn.patch for turn in played.turns):
        return rendered
    ids = played.ids
    text = renderer.encoder.text
    if rendered.ids[: len(played.prompt_ids)] != played.prompt_ids or text(ids, special=True) != text(
        rendered.ids, special=True
    ):
        return rendered
    return replace(rendered, ids=ids, loss_mask=played.mask, behaviour_logps=played.logps)


def replay_of(episode: Episode, ids: Sequence[int], mask: Sequence[int], turns: int) -> Replay:
    """The first turns of an episode, for a policy to go on from.

    Args:
        episode: with `turns` turns that the environment has answered, and more.
        ids, mask: of the episode behind its prompt, 1 on actions, as `KnownTrace` has them.
        turns: how many.
    """
    actions = [run for trained, run in _runs(ids, mask) if trained]
    first = zip(episode.turns[:turns], actions[:turns], strict=True)
    replayed = tuple(Turn(turn.action, turn.step, ids=run, replayed=True) for turn, run in first)
    return Replay(replayed, episode.seed, episode.opening)


def behind_turns(mask: Sequence[int], turns: int) -> int:
    """Where action `turns` begins, from 0, in a mask that is 1 on actions; its length where there are fewer."""
    at = 0
    for trained, run in _runs(mask, mask):
        if trained and turns == 0:
            return at
        turns -= bool(trained)
        at += len(run)
    return at


def _runs(ids: Sequence[int], mask: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    for trained, run in groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0]):
        yield trained, tuple(token for _, token in run)


def _played(episode: Episode) -> Episode:
    """The episode up to the last action that was answered; nothing is said behind that."""
    turns = [replace(turn, replayed=False) for turn in episode.turns if turn.step is not None]
    if turns:
        turns[-1] = replace(turns[-1], boundary=())
    return replace(episode, turns=turns)
