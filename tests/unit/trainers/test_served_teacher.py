"""A teacher behind a small real HTTP server, in vLLM's form and in OpenAI's: the same gradients as with its weights
here, and one message for each way in which such a server fails, from which the run goes on."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file

from posttrain.cli.check import check_recipe
from posttrain.config.schema import ModelConfig
from posttrain.contract.recipes import write_model
from posttrain.errors import EngineError, RecipeError
from posttrain.models.loading import load_policy
from posttrain.trainers.run import train
from posttrain.trainers.served_teacher import distribution

NAME = "a-teacher"


class Listening(ThreadingHTTPServer):
    """Resets no connection of those that come at once."""

    request_queue_size = 64


class Served:
    """Answers /v1/models and /v1/completions by the model of a folder. `spoil` changes an answer before it goes out;
    `dead` closes connections without one; `status` answers with nothing else; of `seen` each is path, body, key."""

    def __init__(self, folder):
        self.model, self.tokenizer = load_policy(ModelConfig(path=str(folder)), seed=0)
        self.spoil, self.dead, self.status, self.seen = None, False, 200, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({"data": [{"id": NAME}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, body, self.headers.get("Authorization")))
                self.answer(outer.completion(body))

            def answer(self, found):
                if outer.dead:
                    self.close_connection = True
                    return
                self.send_response(outer.status)
                if outer.status == 307:
                    self.send_header("Location", outer.url + "/elsewhere")
                raw = json.dumps(found if outer.spoil is None else outer.spoil(found)).encode()
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.http = Listening(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @torch.no_grad()
    def completion(self, body):
        ids = body["prompt"]
        logps = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        own = [logps[t - 1, ids[t]].item() for t in range(1, len(ids))]
        texts = [self.tokenizer.decode([i]) for i in ids]
        if body.get("echo"):
            found = {"tokens": [*texts, "!"], "token_logprobs": [None, *own, -1.0]}
            return {"model": NAME, "choices": [{"logprobs": found}]}
        places = [None]
        for t in range(1, len(ids)):
            best = logps[t - 1].topk(body["prompt_logprobs"]).indices.tolist()
            kept = dict.fromkeys([ids[t], *best])
            texts = {i: self.tokenizer.decode([i]) for i in kept}
            places.append({str(i): {"logprob": logps[t - 1, i].item(), "decoded_token": texts[i]} for i in kept})
        return {"model": NAME, "choices": [{"prompt_logprobs": places}]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served") / "teacher", seed=7)


@pytest.fixture
def server(teacher):
    made = Served(teacher)
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def recipe(load, teacher, tmp_path):
    """`recipe(server, name, **method)`: of three steps, into a folder of that name; without a server from its."""

    def make(served, name, changes=None, reconnect=0.0, **method):
        section = {"name": "opd", **method}
        if served is not None:
            where = {"url": served.url, "served_as": NAME, "reconnect": reconnect}
            section["server"] = where | method.get("server", {})
        return load(section, {"output": str(tmp_path / name), "method.teacher": str(teacher), **(changes or {})})

    return make


def trained(run):
    return load_file(run.run_dir / "model" / "model.safetensors")


def metrics(run):
    rows = (run.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, rows) if "loss" in row]


TOP_K = {"objective": "top_k", "top_k": 4}
MIXED = TOP_K | {"on_policy_share": 0.5, "expert_rows_per_step": 4, "beta": 0.5}


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"discount": 1.0, "updates_per_rollout": 2},
        TOP_K,
        MIXED,
        {"objective": "top_k", "top_k": 64, "tail": False},
        {"server": {"protocol": "openai"}},
    ],
    ids=["policy_gradient", "discounted", "top_k", "with_traces", "whole_vocabulary", "openai"],
)
def test_the_gradients_are_those_of_a_teacher_from_a_folder(recipe, server, method):
    """With plain SGD, whose steps are the gradients: two of them."""
    sgd = {"training.optim": "sgd", "training.learning_rate": 1.0, "training.max_steps": 2}
    served = train(recipe(server, "served", sgd, **method))
    here = train(recipe(None, "here", sgd, **{name: value for name, value in method.items() if name != "server"}))
    ours = trained(served)
    for name, weights in trained(here).items():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=2e-6)
    for one, other in zip(metrics(served), metrics(here), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)
        assert one["flops"] == other["flops"]  # charged by the same size


def test_rows_are_sent_as_ids_with_the_key_and_only_once_for_several_updates(recipe, server, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "secret")
    train(
        recipe(server, "run", {"training.max_steps": 2}, updates_per_rollout=2, server={"api_key_env": "TEACHER_KEY"})
    )
    paths, bodies, keys = zip(*server.seen, strict=True)
    assert set(paths) == {"/v1/completions"} and set(keys) == {"Bearer secret"}
    canary, *rows = [tuple(body["prompt"]) for body in bodies]
    assert len(rows) == 16 + 1 and rows[-1] == canary  # four prompts of four samples, and the canary behind them
    assert {(body["model"], body["max_tokens"], body["prompt_logprobs"]) for body in bodies} == {(NAME, 1, 0)}


def fewer(found):
    for choice in found.get("choices", ()):
        choice["prompt_logprobs"].pop()
    return found


def of_other_ids(found):
    for choice in found.get("choices", ()):
        choice["prompt_logprobs"][1:] = [{"0": {"logprob": -1.0, "decoded_token": "a"}}] * len(
            choice["prompt_logprobs"][1:]
        )
    return found


def with_other_texts(found):
    for choice in found.get("choices", ()):
        for place in choice["prompt_logprobs"][1:]:
            for entry in place.values():
                entry["decoded_token"] = "zz"
    return found


def without_texts(found):
    for choice in found.get("choices", ()):
        for place in choice["prompt_logprobs"][1:]:
            for entry in place.values():
                del entry["decoded_token"]
    return found


def impossible(found):
    for choice in found.get("choices", ()):
        choice["prompt_logprobs"][1] = {i: e | {"logprob": 0.5} for i, e in choice["prompt_logprobs"][1].items()}
    return found


def not_numbers(found):
    for choice in found.get("choices", ()):
        choice["prompt_logprobs"][1] = {
            i: e | {"logprob": float("nan")} for i, e in choice["prompt_logprobs"][1].items()
        }
    return found


def under_another_name(found):
    return found | {"model": "another"} if "model" in found else found


def of_another_model(found):
    return {"data": [{"id": "another"}]} if "data" in found else found


def without_log_probs(found):
    return found | {"choices": [{"text": "4"}]} if "choices" in found else found


def of_another_kind(found):
    return [found]


def far_too_long(found):
    return found | {"filler": "x" * 4_000_000}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (fewer, r"gives \d+ log-probs for a row of \d+ tokens"),
        (of_other_ids, r"gives no log-prob of id \d+"),
        (with_other_texts, "has another tokenizer than the policy: id .* here and 'zz' there"),
        (without_texts, "does not say which tokens it read"),
        (impossible, "gives 0.5 as a log-prob"),
        (not_numbers, "gives nan as a log-prob"),
        (under_another_name, "answers as 'another', not as 'a-teacher'"),
        (of_another_model, "has 'another', not 'a-teacher'"),
        (without_log_probs, "without log-probs of the prompt, or in another form"),
        (of_another_kind, "in another form"),
        (far_too_long, "more than .* bytes"),
    ],
)
def test_an_answer_that_is_no_teachers_is_one_message(recipe, server, spoil, says):
    server.spoil = spoil
    with pytest.raises(EngineError, match=says) as raised:
        train(recipe(server, "run"))
    assert raised.value.where == "method.server" and raised.value.hint


def with_term(served, **more):
    """A `grpo` whose teacher is a term of the advantage, behind the server; without one from its folder."""
    where = {} if served is None else {"server": {"url": served.url, "served_as": NAME, "reconnect": 0.0}}
    teacher = {"path": "TEACHER", "rows": "wrong", "discount": 0.5, **where, **more}
    return {"name": "grpo", "aggregation": "tokens", "terms": {"outcome": {}, "teacher": teacher}}


def test_a_term_of_the_advantage_has_the_same_teacher_behind_a_server(load, server, teacher, tmp_path):
    sgd = {"training.optim": "sgd", "training.learning_rate": 1.0, "training.max_steps": 2}
    runs = []
    for name, where in {"served": server, "here": None}.items():
        changes = sgd | {"method.terms.teacher.path": str(teacher), "output": str(tmp_path / name)}
        runs.append(train(load(with_term(where), changes)))
    assert server.seen
    ours, theirs = map(trained, runs)
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=2e-6)
    sizes = [[row["terms/teacher_size"] for row in metrics(run)] for run in runs]
    assert sizes[0] == pytest.approx(sizes[1], abs=2e-6) and min(sizes[0]) > 0


def test_what_is_wrong_with_the_server_of_a_term_names_its_key(load, write_recipe, server):
    server.spoil = of_another_model
    with pytest.raises(EngineError, match="has 'another', not 'a-teacher'") as raised:
        train(load(with_term(server), {"training.max_steps": 1}))
    assert raised.value.where == "method.terms.teacher.server"
    path = write_recipe(with_term(server), {"rollouts.temperature": 0.7})
    with pytest.raises(RecipeError, match="at temperature 1 alone") as refused:
        check_recipe(path, [], online=False, world_size=1)
    assert "without method.terms.teacher.server" in refused.value.hint


@pytest.mark.parametrize(
    ("status", "says", "hint"),
    [
        (401, "status 401", "api_key_env names"),
        (404, "status 404", "with /v1 at its end"),
        (307, "a redirect, and none is followed", "the address that answers itself"),
        (503, r"went away \(status 503", "--resume auto"),
    ],
)
def test_a_server_that_refuses_is_one_message(recipe, server, status, says, hint):
    server.status = status
    with pytest.raises(EngineError, match=says) as raised:
        train(recipe(server, "run"))
    assert hint in raised.value.hint and not server.seen


def test_too_many_of_the_likeliest_say_how_to_start_the_server(recipe, server):
    run = recipe(server, "run", **TOP_K)
    server.spoil = lambda found: setattr(server, "status", 400) or found if "data" in found else found
    with pytest.raises(EngineError, match="status 400") as raised:
        train(run)
    assert "--max-logprobs 4" in raised.value.hint


def test_a_server_that_dies_ends_the_run_which_goes_on_as_if_it_had_not(recipe, server):
    """Within the third step; what comes of it is bit for bit what comes of a run that nothing interrupts."""
    steps = {"training.max_steps": 4, "training.save_steps": 1}
    whole = train(recipe(server, "whole", steps))
    rows = len(server.seen) // 4
    server.seen.clear()

    def dies(found):
        if len(server.seen) > 2 * rows + 3:
            server.dead = True
        return found

    server.spoil = dies
    with pytest.raises(EngineError, match="the teacher's server went away") as raised:
        train(recipe(server, "cut", steps))
    assert "--resume auto" in raised.value.hint and raised.value.where == "method.server"
    server.spoil, server.dead = None, False
    again = train(recipe(server, "cut", steps), resume="auto")
    assert [row["step"] for row in metrics(again)] == [1, 2, 3, 4]
    for name, weights in trained(whole).items():
        assert torch.equal(trained(again)[name], weights)


def test_a_short_absence_is_waited_for(recipe, server):
    absences = []

    def away(found):
        if len(server.seen) >= 5 and not absences:
            server.dead = True
            absences.append(threading.Timer(0.3, lambda: setattr(server, "dead", False)))
            absences[0].start()
        return found

    server.spoil = away
    assert len(metrics(train(recipe(server, "run", {"training.max_steps": 1}, reconnect=20.0)))) == 1
    assert len(absences) == 1


def test_another_model_in_the_teachers_place_is_noticed_in_the_run_and_behind_it(recipe, server):
    steps = {"training.max_steps": 3, "training.save_steps": 1}
    own, other = server.model, copy.deepcopy(server.model)
    with torch.no_grad():
        other.get_output_embeddings().weight *= 40.0

    def changes(found):
        if len(server.seen) >= 20:
            server.model = other
        return found

    server.spoil = changes
    with pytest.raises(EngineError, match="another model than at the start: .* differ by"):
        train(recipe(server, "run", steps))
    server.spoil = None
    with pytest.raises(EngineError, match="another model than when the checkpoint was written"):
        train(recipe(server, "run", steps), resume="auto")
    server.model = own
    assert metrics(train(recipe(server, "run", steps), resume="auto"))[-1]["step"] == 3


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ({}, {"method.objective": "full"}, "set objective: top_k"),
        (TOP_K, {"method.support": "policy"}, "set support: teacher"),
        (TOP_K, {"method.server.protocol": "openai"}, "take protocol: vllm"),
        ({}, {"rollouts.temperature": 0.7}, "at temperature 1 alone"),
        ({}, {"method.server.api_key_env": "HF_TOKEN"}, "opens more than this server"),
        ({}, {"method.server.url": "http://user:key@host/v1"}, "user, a password"),
    ],
)
def test_what_a_server_cannot_give_is_refused_by_check(write_recipe, teacher, method, changes, says):
    section = {"name": "opd", **method, "server": {"url": "http://127.0.0.1:9/v1"}}
    path = write_recipe(section, {"method.teacher": str(teacher), **changes})
    with pytest.raises(RecipeError, match=says):
        check_recipe(path, [], online=False, world_size=1)


def test_a_server_elsewhere_is_announced(write_recipe, teacher, capsys):
    section = {"name": "opd", "server": {"url": "http://teacher.example/v1", "api_key_env": "TEACHER_KEY"}}
    check_recipe(write_recipe(section, {"method.teacher": str(teacher)}), [], online=False, world_size=1)
    assert "sends prompts and completions to http://teacher.example/v1, with the key in $TEACHER_KEY" in (
        capsys.readouterr().out.replace("\n", " ")
    )


def test_a_few_likeliest_tokens_and_an_even_rest_are_a_distribution():
    logps = torch.tensor([[0.5, 0.3]], dtype=torch.float64).log()
    found = distribution(torch.cat([torch.tensor([[4.0, 1.0]]).double(), logps], dim=1), vocabulary=6).exp()
    torch.testing.assert_close(found, torch.tensor([[0.05, 0.3, 0.05, 0.05, 0.5, 0.05]]))
    sure = torch.tensor([[2.0, 0.0, 0.0, -30.0]], dtype=torch.float64)
    assert distribution(sure, vocabulary=6).isfinite().all()
