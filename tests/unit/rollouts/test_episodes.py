"""Episodes through an engine and an environment: limits, stops, and what an episode does not depend on."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext

import pytest
import torch

from posttrain.config.schema import ModelConfig
from posttrain.data.episodes import Episode, Stop, Turn, read_episodes
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.tasks import TASKS
from posttrain.data.turns import Turns
from posttrain.environments.base import Step
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.rooms import Rooms, first_look
from posttrain.errors import DataError
from posttrain.models.loading import load_policy
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.episodes import EpisodeSampler, environment_seed, replayed
from posttrain.rollouts.transformers_engine import TransformersEngine

TEMPLATE = (
    "{% for m in messages %}{{ m.content + '<eos>' if m.role == 'assistant' else '<bos>' + m.content + '>' }}"
    "{% endfor %}"
)
MODEL = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 512}
PROBLEMS = [
    Problem(f"p/{world}", first_look(level, world), meta={"task": "rooms", "level": level, "world": world})
    for level, world in ((3, 0), (4, 1), (5, 2))
]


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(init=MODEL, chat_template=TEMPLATE), seed=0)


class Script:
    """An engine that says what it is told, turn by turn."""

    policy_version, positions = 3, None

    def __init__(self, renderer: Renderer, said: list[str]) -> None:
        self.renderer, self.said, self.asked = renderer, said, []

    def generate(self, prompts, sampling, limits=None):
        turn = len(self.asked)
        self.asked.append([list(prompt) for prompt in prompts])
        ids = self.renderer.encoder.encode(self.said[turn % len(self.said)])
        stops = not self.said[turn % len(self.said)].endswith("...")
        ids = ids + [self.renderer.template.turn_end.id] if stops else ids
        return [[Completion(ids, [-0.5] * len(ids), "stop" if stops else "length", 3)] for _ in prompts]

    def read_tokens(self, prompts, sampling):
        return sum(map(len, prompts))

    def together(self):
        return nullcontext()


def scripted(policy, said, problems=PROBLEMS[:1], **config):
    renderer = Renderer(policy[1])
    settings = Rooms.Config(workers=0, **({"episode_tokens": 512} | config))
    engine = Script(renderer, said)
    with closing(EnvironmentPool(settings)) as pool:
        sampler = EpisodeSampler(engine, pool, Turns(renderer, settings), settings)
        played = sampler.play(problems, [7] * len(problems), Sampling(max_new_tokens=16))
    return played, engine


def test_the_tokens_of_an_episode(policy):
    actions = [turn for turn, _ in zip(["sing", "go up"], range(2), strict=True)]
    played, engine = scripted(policy, actions, max_turns=2)
    (episode,), renderer = played.episodes, engine.renderer
    seen = PROBLEMS[0].prompt
    assert [text for text, _ in renderer.encoder.pieces(episode.ids, episode.mask)] == [
        f"<bos>{seen}>",
        "sing<eos>",
        f"<bos>no . {seen}>",
        "go up<eos>",
    ]
    assert [on for _, on in renderer.encoder.pieces(episode.ids, episode.mask)] == [0, 1, 0, 1]
    assert episode.logps == [-0.5 * on for on in episode.mask]
    # What the engine was asked is the episode so far, and it is charged for reading all of that.
    first, second = (batch[0] for batch in engine.asked)
    assert episode.ids[: len(second)] == second and second[: len(first)] == first
    assert played.read_tokens == len(first) + len(second) and played.new_tokens == sum(episode.mask)
    assert episode.stop is Stop.TURN_LIMIT and episode.outcome == 0.0 and episode.policy_version == 3
    assert played.drifted == [False]


@pytest.mark.parametrize(
    ("said", "config", "stop", "turns"),
    [
        (["sing"], {"max_turns": 8}, Stop.GAVE_UP, 3),
        (["sing"], {"max_turns": 8, "invalid_in_a_row": 5}, Stop.GAVE_UP, 5),
        (["sing"], {"max_turns": 2}, Stop.TURN_LIMIT, 2),
        (["sing", "go nor..."], {"max_turns": 8}, Stop.CUT, 2),
        (["sing"], {"max_turns": 8, "episode_tokens": 80}, Stop.TOKEN_LIMIT, 2),
        (["sing"], {"max_turns": 8, "crash": 0.99}, Stop.CRASH, 1),
    ],
)
def test_why_an_episode_ends(policy, said, config, stop, turns):
    (episode,) = scripted(policy, said, **config)[0].episodes
    assert episode.stop is stop and len(episode.turns) == turns
    assert (episode.outcome is None) == (stop is Stop.CRASH)
    if stop is Stop.CUT:  # what was cut was not done
        assert episode.turns[-1].step is None


def test_a_solved_episode(policy):
    trace = TASKS["rooms"].expert_trace(PROBLEMS[0])
    (episode,) = scripted(policy, [m["content"] for m in trace[::2]], max_turns=12)[0].episodes
    assert episode.stop is Stop.DONE and episode.total == 1.0 and episode.outcome == 1.0
    # Nothing follows the last action, and the conversation is the one that the expert had.
    assert episode.turns[-1].boundary == () and episode.mask[-1] == 1
    assert episode.messages() == [{"role": "user", "content": PROBLEMS[0].prompt}, *trace]


def test_a_beginning_without_room_is_refused(policy):
    with pytest.raises(DataError, match="episode_tokens 30"):
        scripted(policy, ["sing"], episode_tokens=30)


def sampled(policy, problems, first=0, max_batch=64, n=3):
    model, tokenizer = policy
    renderer, settings = Renderer(tokenizer), Rooms.Config(workers=0, max_turns=4, invalid_in_a_row=9)
    # Letters stop too, so that an untrained model has turns to show; their last token is then not the template's.
    stops = [*renderer.stop_ids, *renderer.encoder.encode("abcdefghijklmnopqrstuvwxyz")]
    engine = TransformersEngine(model, stop_ids=stops, pad_id=tokenizer.pad_token_id, max_batch=max_batch)
    with closing(EnvironmentPool(settings)) as pool, torch.random.fork_rng():
        sampler = EpisodeSampler(engine, pool, Turns(renderer, settings), settings)
        seeds = [environment_seed(5, 0, first + place) for place in range(len(problems))]
        sampling = Sampling(n=n, max_new_tokens=6, seed=5, first_prompt=first)
        return sampler.play(problems, seeds, sampling).episodes


def test_an_episode_does_not_depend_on_those_beside_it(policy):
    """Together, in parts as ranks take them, in small batches: the same tokens."""
    whole = sampled(policy, PROBLEMS)
    parts = [*sampled(policy, PROBLEMS[:1]), *sampled(policy, PROBLEMS[1:], first=1)]
    small = sampled(policy, PROBLEMS, max_batch=2)
    assert [e.ids for e in whole] == [e.ids for e in parts] == [e.ids for e in small]
    assert len({tuple(e.ids) for e in whole}) == 9  # and yet no two alike


def test_log_probs_are_those_of_the_whole_row(policy):
    """The row that is trained on gives each action the log-prob that it was sampled with."""
    episodes = sampled(policy, PROBLEMS)
    assert sum(len(episode.turns) for episode in episodes) > 20
    for episode in episodes:
        ids = torch.tensor([episode.ids])
        with torch.no_grad():
            scores = policy[0](ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        difference = (scores - torch.tensor(episode.logps)[1:]) * torch.tensor(episode.mask)[1:]
        assert difference.abs().max() < 1e-5


def test_episodes_are_written_read_and_played_again(policy, tmp_path):
    episodes = scripted(policy, ["sing", "go up", "go north", "take key"], PROBLEMS, max_turns=4)[0].episodes
    file = tmp_path / "episodes.jsonl"
    file.write_text("".join(json.dumps(episode.row()) + "\n" for episode in episodes))
    read = list(read_episodes(file))
    assert [(e.steps, e.stop, e.seed) for e in read] == [(e.steps, e.stop, e.seed) for e in episodes]
    row = json.loads(file.read_text().splitlines()[0])
    assert row["messages"][0]["content"] == PROBLEMS[0].prompt and row["turns"][0]["ids"]
    with closing(EnvironmentPool(Rooms.Config(workers=0))) as pool:
        assert replayed(pool, read) == [None] * 3
        read[1].turns[1] = Turn("go up", Step("another world"))
        found = replayed(pool, read)
    assert [place for place, one in enumerate(found) if one] == [1] and "turn 1" in found[1]


def test_a_line_that_is_no_episode_is_named(tmp_path):
    file = tmp_path / "episodes.jsonl"
    file.write_text('{"messages": []}\n')
    with pytest.raises(DataError) as wrong:
        list(read_episodes(file))
    assert wrong.value.where == f"{file}:1"
    with pytest.raises(DataError, match="no such file"):
        list(read_episodes(tmp_path / "other.jsonl"))


def test_the_return_of_an_episode_without_a_word_on_success():
    turns = [Turn("a", Step("x", 0.25)), Turn("b", Step("y", 0.5, done=True))]
    assert Episode(PROBLEMS[0], 0, 0, turns=turns, stop=Stop.DONE).outcome == 0.75
    assert Episode(PROBLEMS[0], 0, 0, turns=turns, stop=Stop.TURN_LIMIT).outcome == 0.0
    assert Episode(PROBLEMS[0], 0, 0, turns=turns, stop=Stop.TIMEOUT).outcome is None
