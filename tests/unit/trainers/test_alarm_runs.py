"""Runs that are made to go wrong, and the alarm that each must ring. Healthy ones: `test_rows.py` and `tests/real`."""

import json
import math
import string
from dataclasses import dataclass, field

import pytest

import posttrain as pt
from posttrain.config.schema import ModelConfig
from posttrain.contract.recipes import INIT, tiny_recipe, write_model
from posttrain.models.loading import load_policy
from posttrain.tracking.metrics import METRICS

REWARDS = '''
def constant(completion):
    """All answers alike."""
    return 1.0


def broken(completion):
    """Fails on most answers."""
    raise ValueError("it is broken")


def last_digit(completion):
    """Something to learn."""
    return sum(each in "01234" for each in completion) / 10


def usual(completion):
    """Most answers are right."""
    return float(completion[:1] not in tuple("0123"))


def rare(completion):
    """Few answers are."""
    return 1.0 - usual(completion)


def in_cents(completion):
    """The same in another unit."""
    return 1e5 * last_digit(completion)
'''
CHAT = (
    "{% for m in messages %}{{ REPLY + '<eos>' if m.role == 'assistant' else '<bos>' + m.content + '>' }}{% endfor %}"
)
HEARD = CHAT.replace("REPLY", "m.content")
MISHEARD = CHAT.replace("REPLY", "m.content" + "".join(f"|replace('{letter}', '')" for letter in "jqvxz0123456789"))
"""A template that shows replies as they were, and one that leaves letters out."""


def rewarded(name):
    return [{"type": "python", "function": f"rewards.py:{name}"}]


@dataclass(frozen=True)
class Wrong:
    """A run that goes wrong.

    Attributes:
        method: its section.
        rings: alarms that must ring, and may with others.
        changes: to a tiny recipe, by dotted key.
        start: the run that its policy comes from; by default none was trained before.
    """

    method: dict
    rings: set
    changes: dict = field(default_factory=dict)
    start: str = ""


ROOMS = {
    "model": {"path": "talker", "chat_template": HEARD},
    "data.prompts": {"task": "rooms", "levels": [2, 3], "size": 12},
    "environment": {"type": "rooms", "max_turns": 3, "episode_tokens": 256, "workers": 0, "shaped": True},
    "verifier": None,
    "verifier_pool": None,
    "rollouts.max_new_tokens": 6,
    "training.max_steps": 4,
}
MANY_TOKENS = {"type": "characters", "alphabet": "0123456789+=;#" + "".join(map(chr, range(0x4E00, 0x5200)))}
LONG = {"training.max_steps": 12, "batch.prompts_per_step": 8, "verifier": rewarded("last_digit")}
RUNS = {
    "one reward for all": Wrong(
        {"name": "grpo"},
        {"informative_groups low", "grad_norm low", "refill/filled_share low"},
        {"verifier": rewarded("constant"), "rollouts.refill": {"waves": 2}, "training.max_steps": 6},
    ),
    "a verifier that fails": Wrong(
        {"name": "grpo"}, {"unknown_share high"}, {"verifier": rewarded("broken"), "training.max_steps": 3}
    ),
    "no room to answer": Wrong(
        {"name": "grpo"},
        {"truncated_share high", "completion_length low"},
        {"verifier": rewarded("last_digit"), "rollouts.max_new_tokens": 1, "training.max_steps": 4},
    ),
    "old rollouts and long steps": Wrong(
        {"name": "grpo", "beta": 0.1},
        {"kl high", "approx_kl high"},
        LONG | {"rollouts.sync_every": 12, "training.learning_rate": 0.1},
    ),
    "many updates for a rollout": Wrong(
        {"name": "grpo", "updates_per_rollout": 12, "surrogate": "cispo"},
        {"ratio_mean high", "ratio_max high"},
        LONG | {"training.learning_rate": 0.1, "model": {"init": {**INIT, "tokenizer": MANY_TOKENS}}},
    ),
    "many long updates for a rollout": Wrong(
        {"name": "grpo", "updates_per_rollout": 12},
        {"ratio_mean low", "ratio_clamped_share high"},
        LONG | {"training.learning_rate": 1.0},
    ),
    "a clip range of nothing, right answers": Wrong(
        {"name": "grpo", "updates_per_rollout": 12, "epsilon": 1e-3},
        {"clip_share_high high"},
        LONG | {"verifier": rewarded("usual")},
    ),
    "a clip range of nothing, wrong answers": Wrong(
        {"name": "grpo", "updates_per_rollout": 12, "epsilon": 1e-3},
        {"clip_share_low high"},
        LONG | {"verifier": rewarded("rare")},
    ),
    "rewards in another unit": Wrong(
        {"name": "grpo", "scale_rewards": "none"},
        {"grad_norm high"},
        {"verifier": rewarded("in_cents"), "training.max_steps": 3, "training.learning_rate": 1e-6},
    ),
    "weights that leave float32": Wrong(
        {"name": "sft"},
        {"grad_norm nonfinite"},
        {"training.max_steps": 3, "training.learning_rate": 1e30, "guards.skipped_updates": 9},
    ),
    "dropout that the engine does not see": Wrong(
        {"name": "grpo"},
        {"engine_logp_diff_mean high", "engine_logp_diff_max high"},
        {
            "model.peft": {"type": "lora", "r": 8, "dropout": 0.5, "modules_to_save": ["lm_head"]},
            "verifier": rewarded("last_digit"),
            "training.max_steps": 6,
            "training.learning_rate": 0.3,
        },
    ),
    "prefixes longer than a completion may be": Wrong(
        {"name": "drpo"}, {"prefix_left_out_share high"}, {"rollouts.max_new_tokens": 3, "training.max_steps": 12}
    ),
    "one text by heart": Wrong(
        {"name": "sft"},
        {"entropy low"},
        {
            "model": {"init": {**INIT, "tokenizer": {"type": "characters"}}},
            "data.completions": {"path": "same.jsonl", "chat": False},
            "training.max_steps": 40,
            "training.learning_rate": 0.1,
        },
    ),
    "weights that decay": Wrong(
        {"name": "sft"},
        {"entropy high"},
        {
            "data.completions": {"path": "same.jsonl", "chat": False},
            "training.max_steps": 12,
            "training.learning_rate": 0.01,
            "training.weight_decay": 60.0,
        },
        start="one text by heart",
    ),
    "pairs at a large rate": Wrong(
        {"name": "dpo", "divergence": "forward_kl"},
        {"pairs/chosen_shift low", "held_out/chosen_shift low", "pairs/clamped high"},
        {
            "training.max_steps": 8,
            "training.learning_rate": 0.1,
            "evaluation": {"every": 2, "max_new_tokens": 16, "preferences": {"share": 0.2}},
        },
    ),
    "pairs at a rate of nearly 0": Wrong(
        {"name": "dpo"}, {"pairs/ties high"}, {"training.max_steps": 6, "training.learning_rate": 1e-12}
    ),
    "labels of one prompt": Wrong(
        {"name": "kto"},
        {"unpaired/unmatched high"},
        {"data.unpaired": {"path": "one_prompt.jsonl", "chat": False}, "training.max_steps": 4},
    ),
    "rooms without the language": Wrong({"name": "grpo"}, {"invalid_action_share high"}, ROOMS),
    "rooms that are seen in part": Wrong(
        {"name": "grpo"}, {"observation_cut_share high"}, ROOMS | {"environment.observation_tokens": 32}
    ),
    "rooms with a template that leaves letters out": Wrong(
        {"name": "grpo"},
        {"template_drift_share high"},
        ROOMS | {"model.chat_template": MISHEARD, "environment.template_drift": "keep"},
    ),
}
"""What is wrong -> the run of it. Each takes a second or two."""


def test_every_alarm_is_rung_by_a_run():
    """Each end of each healthy range; values that are not finite have one text for all metrics."""
    ends = {
        f"{name} {end}"
        for name, metric in METRICS.items()
        for end, bound in zip(("low", "high"), metric.healthy or (), strict=False)
        if math.isfinite(bound)
    }
    rung = {alarm for wrong in RUNS.values() for alarm in wrong.rings}
    assert ends == {alarm for alarm in rung if not alarm.endswith(" nonfinite")}
    assert any(alarm.endswith(" nonfinite") for alarm in rung)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, rewards and rows that the recipes name."""
    folder = tmp_path_factory.mktemp("wrong")
    write_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "same.jsonl").write_text(16 * (json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n"))
    rows = [{"prompt": "1+1=", "completion": str(each), "label": each == 2} for each in range(32)]
    (folder / "one_prompt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Without training every second token ends its turn, so that there is something to answer.
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 256}
    talker, tokenizer = load_policy(ModelConfig(init=init, chat_template=HEARD), seed=0)
    stops = tokenizer.convert_tokens_to_ids(list(string.ascii_uppercase + "!#$%&()*+,-/:;=?@[]^_{|}~"))
    talker.generation_config.eos_token_id = [tokenizer.eos_token_id, *stops]
    talker.save_pretrained(folder / "talker")
    tokenizer.save_pretrained(folder / "talker")
    return folder


def ran(name, folder):
    """The run of that name, which is trained once."""
    output, wrong = folder / name.replace(" ", "-"), RUNS[name]
    if not (output / "run" / "model").is_dir():
        output.mkdir()
        model = ran(wrong.start, folder).model if wrong.start else folder / "model"
        recipe = tiny_recipe(wrong.method, output, model, {"tracking.console": "off", **wrong.changes})
        pt.train({key: value for key, value in recipe.items() if value is not None})
    return pt.load_run(output / "run")


@pytest.mark.parametrize("name", RUNS)
def test_what_goes_wrong_rings(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    rang = {alarm["alarm"] for alarm in ran(name, folder).alarms}
    assert RUNS[name].rings <= rang
