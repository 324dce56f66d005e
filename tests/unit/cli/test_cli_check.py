from __future__ import annotations

import json
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest

from posttrain.cli.check import check_recipe, print_marked
from posttrain.config.needs import Needs
from posttrain.data.encoding import Encoder
from posttrain.errors import BatchError, DataError, ModelError, PosttrainError, WorldError
from posttrain.methods import METHODS
from posttrain.methods.base import MethodConfig, PreferenceMethod

SFT = """\
model: {init: {hidden_size: 32, layers: 1}}
data: {completions: {path: traces.jsonl, prompt: question, completion: solution}}
method: {name: sft}
batch: {rows_per_step: 4, micro_batch: 2}
training: {num_train_epochs: 3}
output: run
"""

GRPO = """\
model: {init: {hidden_size: 32, layers: 1}}
data: {prompts: {path: problems.jsonl, prompt: question, reference: answer}}
method: {name: grpo}
verifier: [{type: numeric}]
rollouts: {samples_per_prompt: 4, max_new_tokens: 16}
batch: {prompts_per_step: 4, micro_batch: 4}
training: {max_steps: 2}
output: run
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Checks recipe text in a folder with two small data files, without a network; gives what was printed."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("a check without --online opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    rows = [{"question": f"{i}+1=", "solution": f"{i + 1}", "answer": str(i + 1)} for i in range(12)]
    for name in ("traces.jsonl", "problems.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def check(text: str, *overrides: str, online: bool = False, world_size: int = 1) -> str:
        Path("recipe.yaml").write_text(text)
        check_recipe(Path("recipe.yaml"), list(overrides), online=online, world_size=world_size)
        return capsys.readouterr().out

    return check


def test_what_a_run_on_this_machine_would_refuse_is_said(check, monkeypatch) -> None:
    recipe = GRPO.replace(
        "{init: {hidden_size: 32, layers: 1}}", "{path: a/model, attn_implementation: flex_attention}"
    )
    for device, said in (("cpu", True), ("cuda", False)):
        monkeypatch.setattr("posttrain.cli.check.device_type", lambda device=device: device)
        out = check(recipe)
        assert ("on this machine a run would end with: model.attn_implementation" in out) == said


def test_a_majority_vote_that_no_benchmark_can_take(check) -> None:
    voting = "evaluation={benchmarks: [chain-sum-3], samples: 4, maj: [4]}"
    with pytest.raises(PosttrainError, match="maj@k has no effect"):
        check(GRPO, voting)
    assert "gsm8k" in check(GRPO, voting.replace("chain-sum-3", "gsm8k"))


def test_references_that_cannot_be_read_are_named_by_row(check, tmp_path: Path) -> None:
    out = check(GRPO)
    assert "numeric can read the reference of every problem" in out
    # No model is loaded here, so what one would write is said by the option that samples.
    said = "earn nothing: --batch samples some and counts them"
    assert said not in out and said in check(GRPO.replace("type: numeric", "type: math"))
    rows = [{"question": f"{i}+1=", "answer": "seven" if i in (4, 9) else str(i + 1)} for i in range(12)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        check(GRPO)
    assert "2 of 12 references cannot be read" in caught.value.what and caught.value.where == "problems.jsonl:5"
    assert "problems.jsonl:10: no number in the reference 'seven'" in caught.value.hint


def line_of(out: str, start: str) -> str:
    return next(line for line in out.splitlines() if line.strip().startswith(start))


def test_supervised(check) -> None:
    out = check(SFT)
    assert "keys ok; sft finds what it needs: data.completions" in out
    assert "12 rows: 12 kept" in out
    assert line_of(out, "optimizer steps").split()[2] == "9"  # 3 epochs x 12 rows / 4
    assert line_of(out, "sequences in the run").split()[4] == "36"
    assert "\n0+1=[[1<eos>]]\n" in out
    assert "6 tokens, 2 trained; BOS tokens: 0" in out and "end token trained: yes" in out
    assert "warning" not in out and line_of(out, "peak")


def test_a_bos_before_every_message_is_no_alarm_and_two_in_a_row_are_one(check) -> None:
    said = "two BOS tokens in a row"
    turn = "<bos>{{ m.content }}<eos>"  # as SmolLM2 has it; Llama 2 begins every question so
    for template, warned in ((turn, False), (turn.replace("}}<eos>", "}}<bos><bos><eos>"), True)):
        loop = "{% for m in messages %}" + template + "{% endfor %}{% if add_generation_prompt %}<bos>{% endif %}"
        out = check(GRPO.replace("layers: 1}", f"layers: 1}}, chat_template: '{loop}'"))
        assert "BOS tokens: 2" in out or warned
        assert (said in out) == warned


def test_online(check) -> None:
    out = check(GRPO, "evaluation={benchmarks: [countdown-3]}", world_size=2)
    assert "grpo finds what it needs: data.prompts, rollouts, verifier" in out
    assert "benchmarks: countdown-3" in out
    assert line_of(out, "accumulation steps").split()[2] == "2"
    assert "\n0+1=\n  4 tokens; BOS tokens: 0; reference: '1'\n" in out
    assert line_of(out, "sampling: KV cache")


def test_preferences(check, monkeypatch) -> None:
    class PairConfig(MethodConfig):
        name: Literal["pair"] = "pair"

    class Pair(PreferenceMethod):
        Config, paper = PairConfig, "none"
        needs = Needs(data=("preferences",))
        counts = loss = None

    monkeypatch.setitem(METHODS.entries, "pair", Pair)
    monkeypatch.setattr(Pair, "__abstractmethods__", frozenset())
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "00" if i else "1"} for i in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = SFT.replace("completions: {path: traces.jsonl, prompt: question, completion: solution}", "SOURCE")
    recipe = recipe.replace("SOURCE", "preferences: {path: pairs.jsonl}").replace("name: sft", "name: pair")
    out = check(recipe)
    assert "keys ok; pair finds what it needs: data.preferences" in out
    assert "12 rows: 11 kept, 0 cut (0 without their end token), 1 dropped (1 identical)" in out
    assert "\nchosen preferences/1, trained tokens in [[ ]]\n1+1=[[2<eos>]]\n" in out
    assert "\nrejected preferences/1, trained tokens in [[ ]]\n1+1=[[00<eos>]]\n" in out
    with pytest.raises(PosttrainError, match="data.preferences.completion: the key has no effect"):
        check(recipe, "data.preferences.completion=x")
    with pytest.raises(PosttrainError, match="data.completions.chosen: the key has no effect"):
        check(SFT, "data.completions.chosen=x")
    with pytest.raises(PosttrainError, match="method pair needs `data.preferences`"):
        check(SFT, "method.name=pair")


def test_a_tokenizer_learnt_from_the_data(check) -> None:
    out = check(SFT, "model.init.tokenizer={type: bpe, vocab_size: 270}")
    assert "[[1<eos>]]" in out


def test_a_lost_end_token_is_reported(check) -> None:
    out = check(SFT, "data.max_length=5", "data.too_long=cut", "data.max_lost_share=1.0")
    assert "end token trained: NO" in out and "does not learn to stop" in out


def test_what_is_not_here_is_not_fetched(check) -> None:
    out = check(GRPO, "model={path: someone/some-model}")
    assert "not checked: the tokenizer of someone/some-model is not in the local cache (pass --online to fetch)" in out
    assert "unknown shape of 'someone/some-model', memory not estimated" in out
    assert line_of(out, "prompts in the data").split()[4] == "12"
    out = check(SFT, "data.completions.path=someone/some-data", "model.init.tokenizer={type: bpe}")
    assert "not checked: data.completions (someone/some-data) is not in the local cache" in out
    assert "not checked: the tokenizer, which is learnt from the data" in out
    assert "not counted" in out and "not known" in out


def test_a_model_on_the_hub_that_is_known_by_name(check) -> None:
    out = check(GRPO, "model={path: Qwen/Qwen2.5-0.5B}", "data.max_prompt_length=64")
    assert line_of(out, "parameters").split()[1] == "494,032,768"


def test_what_a_run_would_refuse_is_refused(check) -> None:
    with pytest.raises(DataError, match="no such|missing|not found|does not exist"):
        check(SFT, "data.completions.path=nowhere.jsonl")
    with pytest.raises(BatchError, match="a step takes 16 rows, and the data has 12"):
        check(SFT, "batch.rows_per_step=16")
    with pytest.raises(PosttrainError, match="no benchmark 'countdown'"):
        check(GRPO, "evaluation={benchmarks: [countdown]}")
    with pytest.raises(DataError, match="no row is left"):
        check(SFT, "data.max_length=2")


@pytest.mark.parametrize(
    ("package", "section"),
    [
        ("gymnasium", "{type: gymnasium, id: FrozenLake-v1, actions: [left, down, right, up], episode_tokens: 256}"),
        ("verifiers", "{type: verifiers, factory: 'game.py:load_environment', episode_tokens: 256}"),
    ],
)
def test_an_environment_whose_package_is_not_installed(check, package: str, section: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    Path("game.py").write_text("def load_environment():\n    raise AssertionError('loaded')\n")
    with pytest.raises(WorldError, match=f"{package} is not installed"):
        check(GRPO.replace("verifier: [{type: numeric}]", f"environment: {section}"))


def test_arithmetic_is_checked_before_data_is_read(check) -> None:
    with pytest.raises(BatchError, match="micro-batches of 3"):
        check(SFT, "data.completions.path=nowhere.jsonl", "batch.micro_batch=3")


def test_marks(capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.config.schema import TokenizerInit
    from posttrain.data.sample import Origin, Sample
    from posttrain.models.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(TokenizerInit(), None)
    ids = tokenizer("ab=cd;").input_ids
    sample = Sample(ids=ids, loss_mask=[0, 0, 1, 1, 0, 1], origin=Origin.EXPERT)
    print_marked(sample, Encoder(tokenizer), colour=False)
    assert capsys.readouterr().out == "ab[[=c]]d[[;]]\n"
    print_marked(sample, Encoder(tokenizer), colour=True)
    coloured = capsys.readouterr().out
    assert "[[" not in coloured and coloured.startswith("ab")


def test_a_start_without_some_weights(check, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, "start")
    recipe = SFT.replace("{init: {hidden_size: 32, layers: 1}}", "{path: start}")
    assert "not checked" not in check(recipe)
    file = Path("start/model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 weights of its llama model: {lost}"):
        check(recipe)
