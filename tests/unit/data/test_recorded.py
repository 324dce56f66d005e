"""Recorded episodes as data: what is read back, as what it is trained on, and where it is cut."""

import json
from contextlib import closing
from dataclasses import replace

import pytest

from posttrain.config.schema import ModelConfig, TraceSource
from posttrain.data.episodes import Episode, Stop, Turn, holds_episodes, read_episodes
from posttrain.data.known_traces import TraceBook, fit_traces, load_traces
from posttrain.data.offline_rows import turn_numbers
from posttrain.data.prefixes import CutRule, TurnCutter
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.turns import Turns
from posttrain.environments.base import Failure, Step
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.rooms import Expert, Rooms, first_look
from posttrain.models.loading import load_policy
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.episodes import EpisodeSampler
from posttrain.rollouts.transformers_engine import TransformersEngine

TEMPLATE = (
    "{% for m in messages %}{{ m.content + '<eos>' if m.role == 'assistant' else '<bos>' + m.content + '>' }}"
    "{% endfor %}"
)
LIMITS = {"max_prompt_length": None, "max_length": None, "policy": "error", "max_lost_share": 0.0}
CONFIG = Rooms.Config(workers=0, episode_tokens=512, max_turns=6, invalid_in_a_row=9)
PROBLEM = Problem("p/0", first_look(5, 3), meta={"task": "rooms", "level": 5, "world": 3})


@pytest.fixture(scope="module")
def policy():
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 512}
    return load_policy(ModelConfig(init=init, chat_template=TEMPLATE), seed=0)


def played(policy, replay=None, seed=7):
    """An episode of three by the policy, which ends its turns by chance only."""
    model, tokenizer = policy
    renderer = Renderer(tokenizer)
    stops = [*renderer.stop_ids, *renderer.encoder.encode("abcdefghijklmnopqrstuvwxyz")]
    engine = TransformersEngine(model, stop_ids=stops, pad_id=tokenizer.pad_token_id, max_batch=8)
    with closing(EnvironmentPool(CONFIG)) as pool:
        sampler = EpisodeSampler(engine, pool, Turns(renderer, CONFIG), CONFIG)
        sampling = Sampling(n=3, max_new_tokens=24, seed=5)
        return sampler.play([PROBLEM], [seed], sampling, [replay]).episodes, renderer


def known(path, renderer, keep="all"):
    return fit_traces(load_traces(TraceSource(path=str(path), keep=keep), "t"), renderer, **LIMITS)[0]


def write(path, episodes):
    path.write_text("".join(json.dumps(episode.row()) + "\n" for episode in episodes))
    return path


def by_expert(turns):
    """An episode of text alone, with its answers."""
    agent, seen = Expert(), PROBLEM.prompt
    episode = Episode(PROBLEM, 0, 7, prompt=({"role": "user", "content": seen},), stop=Stop.TURN_LIMIT)
    with closing(EnvironmentPool(CONFIG)) as pool:
        pool.reset({0: (PROBLEM, 7)})
        for _ in range(turns):
            action = agent.act(seen)
            step = pool.step({0: action})[0]
            assert not isinstance(step, Failure)
            episode.turns.append(Turn(action, step))
            seen = step.observation
    return episode


def test_an_episode_is_read_as_it_was_written(policy, tmp_path):
    episodes, _ = played(policy)
    file = write(tmp_path / "episodes.jsonl", episodes)
    assert holds_episodes(file)
    again = list(read_episodes(file))
    assert [episode.row() for episode in again] == [json.loads(json.dumps(episode.row())) for episode in episodes]
    assert [episode.ids for episode in again] == [episode.ids for episode in episodes]


def test_own_ids_are_kept_and_others_are_rendered(policy, tmp_path):
    episodes, renderer = played(policy)
    whole = [episode for episode in episodes if episode.stop is not Stop.CUT and episode.turns]
    expert = by_expert(3)
    traces = known(write(tmp_path / "e.jsonl", [*whole, expert]), renderer)
    assert len(traces) == len(whole) + 1
    text = [text for text, _ in renderer.encoder.pieces(traces[-1].ids, traces[-1].mask)]
    assert text[::2] == [f"{turn.action}<eos>" for turn in expert.turns]
    assert text[1::2] == [f"<bos>{turn.step.observation}>" for turn in expert.turns[:-1]]
    assert traces[-1].logps is None
    # Every action is a turn, and what stands between belongs to the one before.
    numbers = turn_numbers(traces[-1])
    assert [numbers[i] for i, on in enumerate(traces[-1].mask) if on] == [
        number for number, turn in enumerate(text[::2]) for _ in renderer.encoder.encode(turn)
    ]
    # An action that is not canonically encoded is a row of its own ids.
    odd = replace(expert, turns=list(expert.turns), prompt_ids=traces[-1].prompt_ids)
    end = renderer.template.turn_end.id
    for place, turn in enumerate(expert.turns):
        ids = [token for letter in turn.action for token in renderer.encoder.encode(letter)] + [end]
        boundary = renderer.encoder.encode(f"<bos>{turn.step.observation}>") if place < 2 else []
        odd.turns[place] = replace(turn, ids=tuple(ids), logps=(-1.0,) * len(ids), boundary=tuple(boundary))
    (own,) = known(write(tmp_path / "odd.jsonl", [odd]), renderer)
    assert own.prompt_ids + own.ids == odd.ids and own.mask == odd.mask[len(own.prompt_ids) :]
    assert own.logps == odd.logps[len(own.prompt_ids) :]


def test_a_policy_goes_on_behind_recorded_turns(policy, tmp_path):
    expert = by_expert(4)
    _, renderer = played(policy)
    (trace,) = known(write(tmp_path / "e.jsonl", [expert]), renderer)
    assert TraceBook([trace]).of(replace(PROBLEM, id="other"), [1, 2]) == [trace]
    assert TraceBook([trace]).of(replace(PROBLEM, meta={**PROBLEM.meta, "world": 4}), [1, 2]) == []
    cutter = TurnCutter(trace, CutRule(boundary="turn"))
    assert [cutter.at(f) and len(cutter.at(f).replay.turns) for f in (0.2, 0.25, 0.6, 0.99, 1.0)] == [
        None,
        1,
        2,
        3,
        None,
    ]
    prefix = cutter.at(0.5)
    episodes, _ = played(policy, prefix.replay)
    begin = trace.prompt_ids + list(prefix.ids)
    for episode in episodes:
        assert episode.ids[: len(begin)] == begin and not any(episode.mask[: len(begin)])
        assert episode.mask[len(begin)] == 1 and [turn.replayed for turn in episode.turns[:3]] == [True, True, False]
        assert len(episode.turn_rewards) == len(episode.turns) - 2 <= 4
    # The draws of a turn are those of its number, so the first of its own differs from one episode to the next.
    assert len({episode.turns[2].ids for episode in episodes}) > 1
    changed = replace(prefix.replay.turns[1], step=Step("elsewhere"))
    episodes, _ = played(policy, replace(prefix.replay, turns=(prefix.replay.turns[0], changed)))
    assert {episode.stop for episode in episodes} == {Stop.DIVERGED} and "elsewhere" in episodes[0].detail
