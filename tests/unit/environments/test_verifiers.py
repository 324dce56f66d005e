"""Environments of an installed package verifiers; left out where it is not installed."""

import asyncio
import random
from contextlib import closing

import pytest

pytest.importorskip("verifiers")

from posttrain.config.own_code import load
from posttrain.data.episodes import Episode, Stop, Turn
from posttrain.data.sample import Problem
from posttrain.environments.base import Failure, Step
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.verifiers import VerifiersEnvironment, playable
from posttrain.errors import WorldError
from posttrain.rollouts.episodes import replayed

GAME = """
import random

import verifiers as vf
from datasets import Dataset


class Guess(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["low"], state["found"] = random.randrange(10), False
        state["prompt"] = [*state["prompt"], {"role": "user", "content": f"not below {state['low']}"}]
        return state

    async def env_response(self, messages, state, **kwargs):
        if messages[-1].content == "break":
            raise vf.Error("broken")
        if messages[-1].content == state["answer"]:
            state["final_env_response"] = [vf.UserMessage(content="yes")]
            return state["final_env_response"]
        return [vf.UserMessage(content=f"no, {random.randrange(1000)}")]


class Asks(Guess):
    async def get_model_response(self, state, prompt, **kwargs):
        return await super().get_model_response(state, prompt, **kwargs)


async def right(completion, answer):
    return float(any(message.content == answer for message in completion))


def short(state):
    return 1 / len(state["trajectory"])


def compared(states):
    return [0.0 for _ in states]


def made(kind=Guess, funcs=(right, short), turns=-1):
    rubric = vf.Rubric(funcs=list(funcs), weights=[1.0, 0.5][: len(funcs)])
    return kind(dataset=Dataset.from_list([{"question": "guess", "answer": "7"}]), rubric=rubric, max_turns=turns)


def asks():
    return made(Asks)


def groups():
    return made(funcs=[compared])


def tools():
    tool = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}
    return Guess(dataset=Dataset.from_list([{"question": "guess", "answer": "7"}]), tool_defs=[tool])


def none():
    return object()
"""
PROBLEM = Problem("p/0", ({"role": "system", "content": "play"}, {"role": "user", "content": "guess"}), reference="7")


@pytest.fixture
def game(tmp_path):
    (tmp_path / "game.py").write_text(GAME)

    def config(name="made", **changes):
        return VerifiersEnvironment.Config(factory=f"{tmp_path / 'game.py'}:{name}", **({"workers": 0} | changes))

    return config


def played(pool, words, seed=3, number=0):
    (opening,) = pool.reset({number: (PROBLEM, seed)}).values()
    episode = Episode(PROBLEM, 0, seed, opening, stop=Stop.DONE)
    for word in words:
        (step,) = pool.step({number: word}).values()
        assert isinstance(step, Step)
        episode.turns.append(Turn(word, step))
        if step.done:
            break
    pool.end([number])
    return episode


def test_an_environment_is_played_and_judged_by_its_rubric(game):
    with closing(EnvironmentPool(game())) as pool:
        drawn = random.Random(3)
        won = played(pool, ["5", "7", "never said"])
        assert won.opening == f"not below {drawn.randrange(10)}"
        assert [step.observation for step in won.steps] == [f"no, {drawn.randrange(1000)}", ""]
        assert [step.reward for step in won.steps] == [0, 1 + 0.5 / 2] and won.steps[-1].done
    with closing(EnvironmentPool(game(max_turns=3))) as pool:  # the recipe's limit is judged too
        lost = played(pool, ["1", "2", "3", "4"])
        assert [step.done for step in lost.steps] == [False, False, True]
        assert lost.total == pytest.approx(0.5 / 3)
    with closing(EnvironmentPool(game(options={"turns": 1}))) as pool:
        assert played(pool, ["7"]).total == 1.5


def test_an_episode_is_the_same_beside_others_and_again(game):
    with closing(EnvironmentPool(game(workers=1))) as pool:
        episodes = [played(pool, ["1", "2", "7"], seed, seed) for seed in range(4)]
        assert len({episode.steps[0].observation for episode in episodes}) > 1
        assert replayed(pool, episodes) == [None] * 4


def test_the_packages_own_loop_comes_to_the_same(game, tmp_path):
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage

    words = ["5", "6", "7"]
    replies = iter(words)

    async def get_response(self, **_):
        message = ResponseMessage(content=next(replies), finish_reason="stop", is_truncated=False)
        return Response(id="", created=0, model="", message=message)

    client = type("Says", (Client,), {**dict.fromkeys(Client.__abstractmethods__), "get_response": get_response})(None)
    environment = load(f"{tmp_path / 'game.py'}").made()
    row = {"prompt": list(PROBLEM.prompt), "answer": "7", "example_id": 0}
    random.seed(3)

    async def rolled():
        state = await environment.rollout(row, client, "")
        await environment.rubric.score_rollout(state)
        return state

    state = asyncio.run(rolled())
    told = [message.content for message in state["completion"] if message.role == "user"]
    with closing(EnvironmentPool(game())) as pool:
        ours = played(pool, words)
        assert [step.observation for step in ours.steps[:-1]] == [told[-3], told[-2]] and told[-1] == "yes"
        assert ours.total == state["reward"] == 1 + 0.5 / 3


def test_an_error_of_the_environment_is_no_answer(game):
    with closing(EnvironmentPool(game())) as pool:
        pool.reset({0: (PROBLEM, 0)})
        (failure,) = pool.step({0: "break"}).values()
        assert isinstance(failure, Failure) and "broken" in failure.detail


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("asks", "Asks has its own `get_model_response`"),
        ("groups", "judges groups of rollouts"),
        ("tools", "Guess has tools"),
        ("none", "makes a object, which is no MultiTurnEnv"),
    ],
)
def test_what_cannot_be_played_is_refused(game, name, words):
    with pytest.raises(WorldError, match=words), closing(EnvironmentPool(game(name))) as pool:
        pool.start()


def test_versions_of_another_form_are_refused():
    assert all(map(playable, ("0.1.14", "0.1.15.dev3", "0.2", "0.3.1")))
    assert not any(map(playable, ("0.1.9", "0.1.13", "0.4.0", "1.0")))
