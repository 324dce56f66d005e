"""prm: where steps end, which of them are trained, what is refused, and that verifier and search ask for the same."""

import json
import math

import pytest
import torch

from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem, Sample, Stepwise
from posttrain.errors import DataError
from posttrain.methods.prm import PRM, PRMConfig
from posttrain.models.loading import load_classifier
from posttrain.models.tokenizer import load_tokenizer
from posttrain.models.value import ValueScorer, load_value_model
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.trainers.run import train
from posttrain.verifiers.process_reward import ProcessRewardVerifier
from posttrain.verifiers.verdict import Answer, Status

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def method(**parameters):
    return PRM(PRMConfig(**({"separator": ";"} | parameters)))


def row(*steps, labels=None, chat=False):
    problem = Problem("stepwise/0", "1+2+3=", where="steps.jsonl:1", chat=chat)
    return Stepwise(problem, steps, labels or (True,) * len(steps))


@pytest.fixture(scope="module")
def renderer():
    return Renderer(load_tokenizer(ModelConfig(init={"tokenizer": {"type": "characters"}})))


def judged(sample, renderer):
    """Text of the row up to each judged token."""
    return [renderer.text(sample.ids[: place + 1]) for place, one in enumerate(sample.loss_mask) if one]


def test_a_step_is_judged_behind_its_separator_and_the_last_one_before_the_end_token(renderer):
    sample = method().responses(row("1+2=3", "3+3=6"), renderer)["solution"]
    assert judged(sample, renderer) == ["1+2+3=1+2=3;", "1+2+3=1+2=3;3+3=6"]
    assert sample.ids[-1] == renderer.tokenizer.eos_token_id and not sample.loss_mask[-1]


def test_in_a_chat_too(renderer):
    tokenizer = load_tokenizer(ModelConfig(init={"tokenizer": {"type": "characters"}}))
    tokenizer.chat_template = TEMPLATE
    chat = Renderer(tokenizer)
    sample = method(separator="\n").responses(row("1+2=3", "3+3=6", chat=None), chat)["solution"]
    assert [text[-6:] for text in judged(sample, chat)] == ["1+2=3\n", "\n3+3=6"]


def test_a_separator_within_a_step_is_refused(renderer):
    with pytest.raises(DataError, match="step 1 holds ';'") as caught:
        method().responses(row("1+2=3", "3+3;=6"), renderer)
    assert caught.value.where == "steps.jsonl:1"


class OneTokenForTwo:
    """A renderer whose tokenizer has the first two steps in one token."""

    stop_ids = (0,)

    def conversation(self, example):
        return Sample([5, 1, 2, 0], [0, 1, 1, 1], Origin.EXPERT, example.problem.id)

    def text(self, ids):
        return {(1,): "a;b;", (2,): "c"}.get(tuple(ids), "a;b;c")


def test_two_steps_that_end_in_one_token_are_refused():
    with pytest.raises(DataError, match="the ends of 3 steps fall into 2 tokens"):
        method().responses(row("a", "b", "c"), OneTokenForTwo())


def batch(scores, labels, masks):
    mask = torch.tensor(masks, dtype=torch.bool)
    tokens = TokenBatch(mask=mask, scores=torch.tensor(scores, dtype=torch.float64).requires_grad_())
    return PreferenceBatch({"solution": tokens}, {"labels": torch.tensor(labels, dtype=torch.float64)})


def one_row():
    """Steps at positions 1, 3 and 4 with the logits 1.2, -0.4 and -2, the first right."""
    return batch([[9.0, 1.2, 9.0, -0.4, -2.0]], [[1.0, 0.0, 0.0, 0.0]], [[0, 1, 0, 1, 1]])


def test_loss_of_a_row():
    (part,) = method().loss(one_row()).values()
    assert float(part.value.detach()) == pytest.approx(0.903225730781, abs=1e-11)
    assert (part.unit, int(part.count)) == ("steps", 3)
    means = {name: float(total / n) for name, (total, n) in part.diagnostics.items()}
    assert means == {"prm/accuracy": 1.0, "prm/right_share": pytest.approx(1 / 3), "prm/first_error": 1.0}


@pytest.mark.parametrize(
    ("train_on", "expected", "steps"),
    [
        ("until_wrong", math.log1p(math.exp(-1.2)) + math.log1p(math.exp(-0.4)), 2),
        ("last", math.log1p(math.exp(-2)), 1),
    ],
)
def test_which_steps_are_trained(train_on, expected, steps):
    one = method(train_on=train_on)
    (part,) = one.loss(one_row()).values()
    assert float(part.value.detach()) == pytest.approx(expected, abs=1e-12)
    assert int(part.count) == steps == int(one.counts(one_row())["steps"])


def test_the_first_error_is_missed_by_an_earlier_alarm_and_rows_without_one_do_not_count():
    masks, labels = [[0, 1, 1]] * 3, [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    (part,) = method().loss(batch([[9, -1.0, -1.0], [9, -1.0, 1.0], [9, -1.0, -1.0]], labels, masks)).values()
    total, n = part.diagnostics["prm/first_error"]
    assert (int(total), int(n)) == (1, 2)


@pytest.fixture(scope="module")
def trained(tiny_model, make_recipe_data, tmp_path_factory):
    """A run that learns that chains end wrongly in 0, and its rows."""
    from posttrain.config.loading import build_recipe
    from posttrain.config.locations import Locations
    from posttrain.methods import CONFIGS

    folder = tmp_path_factory.mktemp("prm")
    changes = {"training.max_steps": 40}
    data = make_recipe_data(tiny_model, folder, {"name": "prm", "separator": ";"}, changes)
    result = train(build_recipe(data, Locations("test"), CONFIGS))
    rows = [json.loads(line) for line in (folder / "stepwise.jsonl").read_text().splitlines()]
    return result, rows


def test_verifier_and_search_score_as_the_classifier_at_the_ends_of_steps(trained):
    result, rows = trained
    model, tokenizer = load_classifier(ModelConfig(path=str(result.model_dir)), seed=0)
    model.eval()
    judge = ProcessRewardVerifier(
        ProcessRewardVerifier.Config(
            type="process_reward", path=str(result.model_dir), separator=";", aggregate="last", batch_size=3
        )
    )
    value = load_value_model(
        str(result.model_dir),
        like=ModelConfig(path=str(result.model_dir)),
        vocabulary=model.get_input_embeddings().num_embeddings,
    )
    scorer = ValueScorer(value, pad_id=tokenizer.pad_token_id)
    problems = [Problem("p", row["prompt"], chat=False) for row in rows[:8]]
    texts = [";".join(row["completions"]) for row in rows[:8]]
    verdicts = judge.verify(problems, [Answer(text) for text in texts])
    for problem, text, verdict in zip(problems, texts, verdicts, strict=True):
        ids = Renderer(tokenizer).prompt_ids(problem) + tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            own = model(input_ids=torch.tensor([ids])).logits[0, 0]
        assert verdict.score == pytest.approx(float(own.sigmoid()), abs=1e-4)
        assert scorer([ids]) == pytest.approx([float(own)], abs=1e-4)


def test_it_learns_and_wrong_last_steps_are_found(trained):
    result, _ = trained
    last = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["prm/accuracy"] > 0.9 and last["prm/first_error"] > 0.5  # 0 for one that calls every step right


def test_aggregates_and_answers_without_a_step(trained):
    result, rows = trained
    problem, text = Problem("p", rows[0]["prompt"], chat=False), ";".join(rows[0]["completions"])
    scores = {}
    for aggregate in ("min", "product", "mean", "last"):
        config = ProcessRewardVerifier.Config(
            type="process_reward", path=str(result.model_dir), separator=";", aggregate=aggregate, threshold=0.0
        )
        good, empty = ProcessRewardVerifier(config).verify([problem] * 2, [Answer(text), Answer(" ;\n")])
        assert good.status is Status.CORRECT and f"of {len(rows[0]['completions'])} steps" in good.detail
        assert (empty.status, empty.score) == (Status.SKIPPED, None)
        scores[aggregate] = good.score
    assert scores["product"] <= scores["min"] <= scores["mean"] and scores["min"] <= scores["last"]
