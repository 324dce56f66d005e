"""Every chat template that TRL ships, over kinds of conversations: trained is what the assistant says, or refused."""

from __future__ import annotations

import importlib.util
import re
from datetime import date
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Problem
from posttrain.data.turns import Turns
from posttrain.environments.base import Step
from posttrain.errors import DataError, ModelError
from posttrain.models.chat_template import with_clock, with_defaults

FOLDER = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
TEMPLATES = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
END = {  # the token that ends a turn, by the beginning of the template's name
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe_training": "<|user|>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
FRAME = {"gptoss": "<|channel|>final<|message|>", "muse": " to=user<|message|>"}
"""What the model itself writes before an answer, behind the generation prompt."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


CONVERSATIONS = {
    "one": ([user("what is one?")], [said("it is one.")], ()),
    "several": ([user("what is one?")], [said("it is one."), user("and two?"), said("it is two.")], ()),
    "system": ([{"role": "system", "content": "be very brief"}, user("what is one?")], [said("it is one.")], ()),
    "tools": (
        [user("is it cold?")],
        [said("", tool_calls=[CALL]), {"role": "tool", "name": "weather", "content": "3 C"}, said("it is cold.")],
        (WEATHER,),
    ),
    "reasoning": ([user("what is one?")], [said("it is one.", reasoning_content="let me see")], ()),
}
MARK = re.compile(
    r"<\|[^<>|\s'\"]+\|?>|<[^<>|\s'\"]+\|>|<｜[^<>\s]+?｜>|<(?:start|end)_of_[a-z]+>|\[[A-Z_/]+\]|<s>|</s>|\[gMASK\]|<sop>"
)


def beginning(table: dict[str, str], name: str) -> str | None:
    return next((value for key, value in table.items() if name.startswith(key)), None)


@pytest.fixture(scope="module")
def renderer_of(family_tokenizer):
    @cache
    def make(name: str) -> Renderer:
        text = TEMPLATES[name].read_text(encoding="utf-8")
        end = beginning(END, name) or "<|endoftext|>"
        text = with_clock(text, date(2026, 1, 31)) if "strftime_now" in text else text
        return Renderer(family_tokenizer("byte_level", MARK.findall(text), bos="<bos>", eos=end, template=text))

    return make


REFUSED = {  # by the names of templates; all else is rendered
    "one": "deepseek|nemotron",
    "several": "deepseek|nemotron",
    "system": "deepseek|nemotron|gemma(_training)?$",
    "tools": "cohere|deepseek|nemotron|gemma(_training)?$|gemma3|idefics3|lfm2(_training)?$|llama3(_training)?$|llava"
    "|phi3|qwen2_5_vl|smolvlm",
    "reasoning": "cohere|gemma(_training)?$|gemma3|gemma4(_v[234])?$|idefics3|lfm2(_v2)?(_training)?$|llama3|llava|phi3"
    "|qwen2_5|qwen3_5_nothink|qwen3_instruct|qwen3_vl|smolvlm",
}
SPLIT = {"several": "gptoss|qwen3$|qwen3_5_(no)?think$|qwen3_6$", "tools": "qwen3$"}
"""One sequence for each turn, as the template renders earlier turns otherwise."""

CALL_END = {"diffusion_gemma": "<|tool_response>", "gemma4_v2": "<turn|>", "gemma4": "<|tool_response>"}
CALL_END |= {"gptoss": "<|call|>", "glm4moe_training": "<|observation|>"}
"""What ends a turn that calls a tool, where it is another token."""


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if beginning(END, name) is not None])
def test_templates_of_trl(renderer_of, name, conversation):
    renderer, (prompt, completion, tools) = renderer_of(name), CONVERSATIONS[conversation]
    example = Example(Problem("p", tuple(prompt), where="f:3", tools=tools), tuple(completion))
    if re.match(REFUSED[conversation], name):
        with pytest.raises(DataError) as error:
            renderer.samples(example)
        assert error.value.where == "f:3" and re.search("model.chat_template|model.template_kwargs", error.value.hint)
        return
    samples = renderer.samples(example)
    replies = [message for message in completion if message["role"] == "assistant"]
    assert len(samples) == (len(replies) if re.match(SPLIT.get(conversation, "$"), name) else 1)
    runs = [text for s in samples for text, on in renderer.encoder.pieces(s.ids, s.loss_mask) if on]
    assert len(runs) == len(replies)
    end, frame = beginning(END, name), beginning(FRAME, name) or ""
    if name == "glm4moe":  # its turns end where the next begins; only the last has an end token
        runs = [run.removesuffix(end) + end for run in runs]
    for reply, run in zip(replies, runs, strict=True):
        ends = (beginning(CALL_END, name) or end) if "tool_calls" in reply else end
        said = run.removesuffix(ends).removesuffix("<|END_RESPONSE|>")
        assert run.endswith(ends) and said != run
        if "tool_calls" in reply:
            assert "weather" in said and "Oslo" in said and "cold" not in said
        elif "reasoning_content" in reply:
            assert re.fullmatch(
                r"\W*(think|channel|thought|analysis|message|to=self|\W)*let me see.*it is one\.", said, re.S
            )
        else:
            assert said.removeprefix(frame).strip(" ") == reply["content"]
    # What is not trained on before the first reply is the prompt of rollouts and what the template puts behind it.
    assert samples[0].ids[: samples[0].prompt_length] == renderer.prompt_ids(example.problem)


NO_TURNS = "glm4moe$|gptoss"
"""Its turns end without a token of their own, or with another one in the middle of a conversation than at its end."""

DRIFTS = "cohere2|deepseek|glm4moe_training|idefics3|lfm2_2_5|llava|muse|nemotron|qwen3$|qwen3_(5_nothink|5_think|6)$"
DRIFTS += "|qwen3_(8|training)|smolvlm"
"""Earlier turns are shown otherwise than they were sampled: without their reasoning, with a space, with a frame."""


@pytest.mark.parametrize("name", [name for name in TEMPLATES if beginning(END, name) is not None])
def test_turns_of_episodes(renderer_of, name):
    """Actions stay as they were sampled, by an unusual tokenization; between them stands what the template writes."""
    renderer, keep = renderer_of(name), SimpleNamespace(observation_tokens=64, template_drift="keep")
    if re.match(NO_TURNS, name):
        with pytest.raises(ModelError):
            Turns(renderer, keep)
        return
    turns = Turns(renderer, keep)
    assert (turns.drift is not None) == bool(re.match(DRIFTS, name)), turns.drift
    talk = turns.open(Problem("p", "where am i?", where="f:3"), "in a hall")
    expected = list(talk.ids)
    thinks = renderer.template.opens_thought(renderer.template.generation)
    for way, place in (("north", "a cellar"), ("south", "a tower"), ("east", "a porch"), ("west", "a vault")):
        said = f"let me see\n</{thinks}>\n\ngo {way}" if thinks else f"go {way}"
        action = [token for character in said for token in renderer.encoder.encode(character)] + [turns.end.id]
        boundary = turns.go_on(talk, action, Step(place))
        expected += [*action, *boundary]
        between = renderer.encoder.text(boundary, special=True)
        assert between.count(place) == 1 and "go " not in between and turns.end.id not in boundary[:1]
    assert talk.ids == expected
    if turns.drift is None:
        assert not turns.drifts(talk)


def test_the_page_on_agents_counts_them():
    """Of all templates: how many hold turns, and how many show them as they were."""
    known = [name for name in TEMPLATES if beginning(END, name) is not None]
    hold = [name for name in known if not re.match(NO_TURNS, name)]
    exact = [name for name in hold if not re.match(DRIFTS, name)]
    page = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")
    assert (
        f"Of the {len(TEMPLATES)} templates that TRL ships, {len(hold)} hold several turns; {len(exact)} pass" in page
    )


@pytest.mark.parametrize("conversation", ["one", "several", "system", "tools"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith("nemotron")])
def test_a_way_out_that_is_told_is_one(family_tokenizer, name, conversation):
    """These open a thought in their generation prompt; the refusal names the setting that lets them not think."""
    text, end = TEMPLATES[name].read_text(encoding="utf-8"), beginning(END, name)
    specials = MARK.findall(text)
    prompt, completion, tools = CONVERSATIONS[conversation]
    example = Example(Problem("p", tuple(prompt), where="f:3", tools=tools), tuple(completion))
    thinking, not_thinking = (
        Renderer(family_tokenizer("byte_level", specials, bos="<bos>", eos=end, template=template))
        for template in (text, with_defaults(text, {"enable_thinking": False}))
    )
    with pytest.raises(DataError) as error:
        thinking.samples(example)
    assert "model.template_kwargs: {enable_thinking: false}" in error.value.hint
    replies = [message for message in completion if message["role"] == "assistant"]
    samples = not_thinking.samples(example)
    runs = [text for s in samples for text, on in not_thinking.encoder.pieces(s.ids, s.loss_mask) if on]
    assert len(runs) == len(replies) and all(run.endswith(end) for run in runs)
    for reply, run in zip(replies, runs, strict=True):
        said = run.removesuffix(end).strip()
        assert said == reply["content"] if reply["content"] else "weather" in said and "Oslo" in said
