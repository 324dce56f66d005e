"""Episodes through a real vLLM: the same ones each time, as the trainer scores them, with turns read from the cache."""

import importlib.util
from contextlib import closing

import pytest
import torch
from accelerate import Accelerator

from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.turns import Turns
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.rooms import Rooms, first_look
from posttrain.models.loading import load_policy
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.episodes import EpisodeSampler
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (docs/vllm.md)"),
]

TEMPLATE = (
    "{% for m in messages %}{{ m.content + '<eos>' if m.role == 'assistant' else '<bos>' + m.content + '>' }}"
    "{% endfor %}"
)
INIT = {"hidden_size": 64, "layers": 2, "heads": 2, "max_length": 512}
CONFIG = Rooms.Config(workers=0, episode_tokens=512, max_turns=5, invalid_in_a_row=9)
HOUSE = "You are in a house of rooms. " * 5
PROBLEMS = [
    Problem(
        f"p/{world}",
        "You are in a house of rooms. " * 5 + first_look(level, world),
        meta={"level": level, "world": world},
    )
    for level, world in ((3, 0), (4, 1), (5, 2))
]


def test_rounds_of_sampling(monkeypatch):
    from posttrain.rollouts.vllm_engine import ColocatedVllm

    model, tokenizer = load_policy(ModelConfig(init=INIT, chat_template=TEMPLATE), seed=0)
    renderer = Renderer(tokenizer)
    # Letters stop too, so that an untrained model has turns to show.
    stops = [*renderer.stop_ids, *renderer.encoder.encode("abcdefghijklmnopqrstuvwxyz")]
    limit = canary_limit(None, trainer_float32=True, engine_dtype="float32")
    canary = Canary([renderer.prompt_ids(PROBLEMS[0])], stops[0], limit)
    weights = PolicyWeights(model, Accelerator(cpu=True))
    engine = ColocatedVllm(weights, canary, stop_ids=stops, dtype="float32", max_length=512, max_batch=16)
    cached, generate = [], engine._llm.generate

    def noted(*arguments, **how):
        outputs = generate(*arguments, **how)
        cached.append([(len(output.prompt_token_ids), output.num_cached_tokens) for output in outputs])
        return outputs

    monkeypatch.setattr(engine._llm, "generate", noted)

    def play(problems, first=0):
        with closing(EnvironmentPool(CONFIG)) as pool:
            sampler = EpisodeSampler(engine, pool, Turns(renderer, CONFIG), CONFIG)
            sampling = Sampling(n=3, max_new_tokens=12, seed=5, first_prompt=first)
            return sampler.play(problems, [7] * len(problems), sampling).episodes

    try:
        engine.sync(0)
        episodes = play(PROBLEMS)
        assert sum(len(episode.turns) for episode in episodes) > 2 * len(episodes)
        # Turns behind the first find whole blocks of what was read before.
        assert any(known >= 128 for round_ in cached[1:] for _, known in round_)
        for episode in episodes:
            with torch.no_grad():
                scores = model(torch.tensor([episode.ids])).logits[0].float().log_softmax(-1)
            own = scores[:-1].gather(1, torch.tensor(episode.ids[1:])[:, None])[:, 0]
            told = torch.tensor(episode.logps[1:])
            on = torch.tensor(episode.mask[1:]).bool()
            assert (own - told)[on].abs().max() < 1e-5
        engine.sync(1)  # the same weights; what was cached is forgotten
        again = play(PROBLEMS)
        assert [episode.row() for episode in again] == [episode.row() for episode in episodes]
        # Nor does it matter which others are played with them.
        alone = play(PROBLEMS[2:], first=2)
        assert [episode.ids for episode in alone] == [episode.ids for episode in episodes[6:]]
    finally:
        engine.close()
