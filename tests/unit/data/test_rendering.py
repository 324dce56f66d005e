from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Origin, Problem
from posttrain.errors import DataError, ModelError


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def trained(renderer: Renderer, sample) -> str:
    return renderer.tokenizer.decode([token for token, on in zip(sample.ids, sample.loss_mask, strict=True) if on])


def shown(renderer: Renderer, ids) -> str:
    return renderer.tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------------- plain text


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize(
    ("adds", "prompt", "expected"),
    [
        ("", "1+1=", "1+1="),
        ("bos", "1+1=", "<bos>1+1="),
        ("bos", "<bos>1+1=", "<bos>1+1="),  # already there: not twice
        ("", "<bos>1+1=", "<bos>1+1="),
        ("bos eos", "1+1=", "<bos>1+1="),  # no end token within the sequence
    ],
)
def test_plain(make_tokenizer, adds, prompt, expected, pad_is_eos):
    renderer = Renderer(make_tokenizer(adds=adds, pad_is_eos=pad_is_eos))
    problem = Problem("p/0", prompt)
    ids = renderer.prompt_ids(problem)
    assert shown(renderer, ids) == expected
    sample = renderer.sample(Example(problem, " 2"))
    assert sample.ids[: len(ids)] == ids
    assert sample.loss_mask == [0] * len(ids) + [1, 1, 1]
    assert trained(renderer, sample) == " 2<eos>"
    assert (sample.origin, sample.problem_id, sample.finished) == (Origin.EXPERT, "p/0", True)


def test_plain_end_token_is_not_doubled(make_tokenizer):
    renderer = Renderer(make_tokenizer(pad_is_eos=True))
    sample = renderer.sample(Example(Problem("p", "a<eos>b"), "cd<eos>"))
    # Masks follow positions: end tokens within the prompt stay masked.
    assert trained(renderer, sample) == "cd<eos>"
    assert sample.loss_mask == [0, 0, 0, 1, 1, 1]


def test_end_tokens_within_a_plain_completion_are_refused(make_tokenizer):
    renderer = Renderer(make_tokenizer("chatml"))
    for completion, token in (("c<eos>d", "<eos>"), ("c<|im_end|>d<eos>", "<|im_end|>")):
        with pytest.raises(DataError, match=re.escape(repr(token))) as error:
            renderer.sample(Example(Problem("p", "a", chat=False, where="f:3"), completion))
        assert error.value.where == "f:3"
    # Written by hand in a template's markup, a completion may end with the token that the template uses.
    handmade = Problem("p", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", chat=False)
    assert trained(renderer, renderer.sample(Example(handmade, "b<|im_end|>"))) == "b<|im_end|>"


@pytest.mark.parametrize(
    ("problem", "completion", "message"),
    [
        (Problem("p", "a", where="f:3"), "", "the completion is empty"),
        (Problem("p", "a", where="f:3"), "<eos>", "the completion is empty"),
        (Problem("p", "<bos><bos>a", where="f:3"), "a", "begins with two '<bos>' tokens"),
        (Problem("p", "a", where="f:3"), (assistant("b"),), "the prompt is plain text"),
        (Problem("p", (user("a"),), where="f:3"), "b", "there is no chat template"),
        (Problem("p", "a", chat=True, where="f:3"), "b", "there is no chat template"),
    ],
)
def test_bad_plain_examples(make_tokenizer, problem, completion, message):
    with pytest.raises(DataError) as error:
        Renderer(make_tokenizer(adds="bos")).sample(Example(problem, completion))
    assert message in str(error.value) and error.value.where == "f:3"


def test_an_empty_prompt_needs_a_bos_token(make_tokenizer):
    assert Renderer(make_tokenizer(adds="bos")).prompt_ids(Problem("p", "")) == [1]
    with pytest.raises(DataError, match="the prompt has no tokens"):
        Renderer(make_tokenizer()).prompt_ids(Problem("p", ""))


def test_plain_text_is_tokenized_apart_where_a_joint_tokenization_would_merge():
    renderer = Renderer(newline_tokenizer())
    prompt = renderer.prompt_ids(Problem("p", "a\n"))
    sample = renderer.sample(Example(Problem("p", "a\n"), "\nb"))
    joint = renderer.tokenizer("a\n\nb").input_ids
    assert sample.ids[: len(prompt)] == prompt and sample.ids[: len(joint)] != joint
    assert shown(renderer, sample.ids) == "a\n\nb<eos>"


# ------------------------------------------------------------------------------------------------------------- chat

PROMPT = {
    "chatml": "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<bos><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi3": "<|user|>\n1+1?<|end|>\n<|assistant|>\n",
    "no_stop": "user: 1+1?\nassistant: ",
}
REPLY = {"chatml": "2<|im_end|>", "llama3": "2<|eot_id|>", "phi3": "2<|end|>", "no_stop": "2\n<eos>"}
BETWEEN = {
    "chatml": "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi3": "\n<|user|>\nand?<|end|>\n<|assistant|>\n",
}


@pytest.mark.parametrize("adds", ["", "bos"])
@pytest.mark.parametrize("template", PROMPT)
def test_chat(make_tokenizer, template, adds):
    renderer = Renderer(make_tokenizer(template, adds))
    for prompt, reply in (("1+1?", "2"), ((user("1+1?"),), (assistant("2"),)), ((user("1+1?"),), "2")):
        problem = Problem("p/0", prompt)
        ids = renderer.prompt_ids(problem)
        assert shown(renderer, ids) == PROMPT[template]
        sample = renderer.sample(Example(problem, reply))
        assert sample.ids[: len(ids)] == ids and sample.loss_mask == [0] * len(ids) + [1] * (len(sample.ids) - len(ids))
        assert trained(renderer, sample) == REPLY[template]


@pytest.mark.parametrize("template", BETWEEN)
def test_only_the_assistant_is_trained_on_over_several_turns(make_tokenizer, template):
    renderer = Renderer(make_tokenizer(template))
    example = Example(Problem("p", (user("1+1?"),)), (assistant("2"), user("and?"), assistant("3")))
    sample = renderer.sample(example)
    assert shown(renderer, sample.ids) == (
        PROMPT[template] + REPLY[template] + BETWEEN[template] + REPLY[template].replace("2", "3")
    )
    assert trained(renderer, sample) == REPLY[template] + REPLY[template].replace("2", "3")


def test_turns_without_an_end_token_end_the_sample_with_eos(make_tokenizer):
    renderer = Renderer(make_tokenizer("no_stop"))
    example = Example(Problem("p", (user("a"),)), (assistant("b"), user("c"), assistant("d")))
    sample = renderer.sample(example)
    assert shown(renderer, sample.ids) == "user: a\nassistant: b\nuser: c\nassistant: d\n<eos>"
    assert trained(renderer, sample) == "b\nd\n<eos>"
    assert renderer.notices() == [
        "the chat template ends turns without a token: only the last reply of a row is trained to end, with '<eos>' "
        "behind what the template writes (1 times)"
    ]
    ends = Renderer(make_tokenizer("chatml"))
    ends.sample(example)
    assert ends.notices() == []


def test_a_prompt_may_end_inside_the_reply(make_tokenizer):
    renderer = Renderer(make_tokenizer("chatml"))
    problem = Problem("p", (user("1+1?"), assistant("It is")), where="f:3")
    assert shown(renderer, renderer.prompt_ids(problem)) == PROMPT["chatml"] + "It is"
    sample = renderer.sample(Example(problem, " 2."))
    assert shown(renderer, sample.ids) == PROMPT["chatml"] + "It is 2.<|im_end|>"
    assert trained(renderer, sample) == " 2.<|im_end|>"
    for completion, message in (((assistant(" 2."),), "must be text"), (" ", "the completion is empty")):
        with pytest.raises(DataError, match=message):
            renderer.sample(Example(problem, completion))


def test_control_tokens_typed_into_a_message_are_text(make_tokenizer):
    tokenizer = make_tokenizer("chatml", pad_is_eos=True)
    renderer = Renderer(tokenizer)
    typed = "b<|im_end|>\nc<eos><|im_start|>user"
    sample = renderer.sample(Example(Problem("p", "what is <|im_end|> for?"), typed))
    assert (
        shown(renderer, sample.ids)
        == PROMPT["chatml"].replace("1+1?", "what is <|im_end|> for?") + typed + "<|im_end|>"
    )
    assert trained(renderer, sample) == typed + "<|im_end|>"
    ends = [index for index, token in enumerate(sample.ids) if token in renderer.stop_ids]
    assert len(ends) == 2 and ends[-1] == len(sample.ids) - 1  # of the question and of the reply
    assert sample.ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert sum("'<|im_end|>' typed into a message" in notice for notice in renderer.notices()) == 1
    # Tokens that the template builds nothing of stay what they are.
    other = renderer.sample(Example(Problem("p", "a"), "b<|user|>c"))
    assert tokenizer.convert_tokens_to_ids("<|user|>") in other.ids


def test_an_end_token_that_cannot_be_written_as_text_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens(AddedToken("<turn_end>", special=False))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<turn_end>")
    with pytest.raises(DataError, match="message 1 holds '<turn_end>'") as error:
        Renderer(tokenizer).sample(Example(Problem("p", "a", where="f:3"), "b<turn_end>c"))
    assert error.value.where == "f:3"


@pytest.mark.parametrize(
    ("chat", "allowed", "is_chat"),
    [(None, True, True), (True, True, True), (False, True, False), (None, False, False)],
)
def test_who_decides_about_chat(make_tokenizer, chat, allowed, is_chat):
    renderer = Renderer(make_tokenizer("chatml"), chat_template_allowed=allowed)
    ids = renderer.prompt_ids(Problem("p", "1+1?", chat=chat))
    assert shown(renderer, ids) == (PROMPT["chatml"] if is_chat else "1+1?")


TURNS = (assistant("r#b"), user("c"), assistant("d"))


@pytest.mark.parametrize(
    ("template", "problem", "completion", "message"),
    [
        (
            "opens_thought",
            Problem("p", "a"),
            "b",
            "the prompt ends in an open <think>, and the reply has no thought that would close it",
        ),
        ("strips_history", Problem("p", (user("a"),)), TURNS, "renders the start of the conversation differently"),
        ("double_bos", Problem("p", "a"), "b", "begins with two '<bos>' tokens"),
        ("refuses_system", Problem("p", ({"role": "system", "content": "s"}, user("a"))), "b", "no system here"),
        ("chatml", Problem("p", "a"), " ", "the completion is empty"),
        ("chatml", Problem("p", "a"), (), "does not begin with an assistant message"),
        ("drops_system", Problem("p", ({"role": "system", "content": "s"}, user("a"))), "b", "leaves out message 0"),
        ("chatml", Problem("p", "a"), (assistant("b"), user("c")), "does not end with an assistant message"),
        ("chatml", Problem("p", "a"), (user("b"), assistant("c")), "does not begin with an assistant message"),
    ],
)
def test_bad_chats(make_tokenizer, template, problem, completion, message):
    with pytest.raises(DataError) as error:
        Renderer(make_tokenizer(template)).sample(Example(replace(problem, where="f:3"), completion))
    assert message in str(error.value) and error.value.where == "f:3"


def test_templates_that_cannot_be_used(make_tokenizer):
    with pytest.raises(ModelError, match="leaves out what the assistant says"):
        Renderer(make_tokenizer("drops_reply"))
    several = make_tokenizer()
    several.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(ModelError, match="several chat templates"):
        Renderer(several)
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        Renderer(endless)


def test_the_default_of_several_templates_is_used(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "x"}
    renderer = Renderer(tokenizer)
    assert shown(renderer, renderer.prompt_ids(Problem("p", "1+1?"))) == PROMPT["chatml"]


def test_chat_is_split_where_tokens_would_span_the_boundary(make_tokenizer):
    template = make_tokenizer("no_stop").chat_template.replace("assistant: ", "assistant:\\n")
    renderer = Renderer(newline_tokenizer(template.replace("m['role'] + ': '", "m['role'] + ':\\n'")))
    problem = Problem("p", "a")
    prompt = renderer.prompt_ids(problem)
    sample = renderer.sample(Example(problem, "\n\nb"))
    assert sample.ids[: len(prompt)] == prompt
    assert shown(renderer, sample.ids) == "user:\na\nassistant:\n\n\nb\n<eos>"
    assert trained(renderer, sample) == "\n\nb\n<eos>"


def newline_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has learnt tokens of several newlines."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["\n\n\n\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


# -------------------------------------------------------------------------------------------------- the rest, in public


@pytest.mark.parametrize(
    ("template", "generation_eos", "expected"),
    [
        (None, None, ["<eos>"]),
        ("chatml", None, ["<eos>", "<|im_end|>"]),
        ("llama3", 2, ["<eos>", "<|eot_id|>"]),
        ("no_stop", [2, 0], ["<eos>", "<pad>"]),
    ],
)
def test_stop_ids(make_tokenizer, template, generation_eos, expected):
    renderer = Renderer(make_tokenizer(template), generation_eos=generation_eos)
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids) == expected


def test_text_has_no_special_tokens_and_all_spaces(make_tokenizer):
    renderer = Renderer(make_tokenizer("chatml"))
    ids = renderer.tokenizer("a , b .\n  it 's<|im_end|><eos>", add_special_tokens=False).input_ids
    assert renderer.text(ids) == "a , b .\n  it 's"


def test_head_ids(make_tokenizer):
    assert Renderer(make_tokenizer(adds="bos")).head_ids == [1]


def test_template_hash(make_tokenizer):
    hashes = {
        name: Renderer(make_tokenizer(template, adds), chat_template_allowed=allowed).template_hash
        for name, template, adds, allowed in (
            ("plain", None, "", True),
            ("bos", None, "bos", True),
            ("chatml", "chatml", "", True),
            ("llama3", "llama3", "", True),
            ("ignored", "chatml", "", False),
        )
    }
    assert hashes["plain"] == hashes["ignored"]
    assert len(set(hashes.values())) == 4 and all(len(found) == 64 for found in hashes.values())
    assert hashes["llama3"] == Renderer(make_tokenizer("llama3")).template_hash


CONTENT = st.text("ab1 \n<|>é#", min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from(["chatml", "llama3", "phi3", "no_stop", None]),
    adds=st.sampled_from(["", "bos", "bos eos"]),
    pad_is_eos=st.booleans(),
    system=st.none() | CONTENT,
    turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3),
)
def test_renderings_extend_the_prompt_and_masks_mark_the_replies(
    make_tokenizer, template, adds, pad_is_eos, system, turns
):
    tokenizer = make_tokenizer(template, adds, pad_is_eos)
    renderer = Renderer(tokenizer)
    question, reply = turns[0]
    if template is None:
        example = Example(Problem("p", question), reply)
        expected = [reply + "<eos>"]
    else:
        prompt = ([] if system is None else [{"role": "system", "content": system}]) + [user(question)]
        later = [message for ask, answer in turns[1:] for message in (user(ask), assistant(answer))]
        example = Example(Problem("p", tuple(prompt)), (assistant(reply), *later))
        ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>", "no_stop": "\n"}
        replies = [answer.strip() if template == "llama3" else answer for _, answer in turns]
        expected = [answer + ends[template] for answer in replies]
        if template == "no_stop":
            expected[-1] += "<eos>"
    sample = renderer.sample(example)
    prompt_ids = renderer.prompt_ids(example.problem)
    assert sample.ids[: len(prompt_ids)] == prompt_ids
    assert sample.loss_mask.index(1) == len(prompt_ids)
    # Unknown characters become <unk>, so tokens are compared.
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in expected]
    runs, previous = [], 0
    for token, on in zip(sample.ids, sample.loss_mask, strict=True):
        if on and not previous:
            runs.append([])
        if on:
            runs[-1].append(token)
        previous = on
    assert runs == tokens
    assert sample.loss_mask[-1] == 1 and sample.ids[-1] in renderer.stop_ids


def test_real_rows(test_data, make_tokenizer):
    lines = (test_data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    for template in ("chatml", "llama3", None):
        renderer = Renderer(make_tokenizer(template, "bos"))
        for line in lines:
            row = json.loads(line)
            sample = renderer.sample(Example(Problem("p", row["question"]), row["answer"]))
            known = renderer.text(renderer.tokenizer(row["answer"].strip()).input_ids)
            assert renderer.text([t for t, on in zip(sample.ids, sample.loss_mask, strict=True) if on]).strip() == known
