"""Chat templates of the large families, written from their documentation, over kinds of conversations.

Expected is the whole rendering as a person would write it down, with what is trained on between ⟦ and ⟧, one text for
each sequence; or the reason of a refusal. Templates lie in `tests/fixtures/templates`.
"""

from __future__ import annotations

import re
from datetime import date
from functools import cache
from pathlib import Path

import pytest

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Problem
from posttrain.errors import DataError
from posttrain.models.chat_template import with_clock, with_defaults

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


CONVERSATIONS = {
    "one": ([user("one?")], [said("it is one")], ()),
    "several": ([user("one?")], [said("it is one"), user("two?"), said("it is two")], ()),
    "system": ([{"role": "system", "content": "be brief"}, user("one?")], [said("it is one")], ()),
    "tools": (
        [user("cold?")],
        [said("", tool_calls=[CALL]), {"role": "tool", "name": "weather", "content": "3 C"}, said("it is cold")],
        (WEATHER,),
    ),
    "reasoning": ([user("one?")], [said("it is one", reasoning_content="let me see")], ()),
    "thought in text": ([user("one?")], [said("<think>\nlet me see\n</think>\n\nit is one")], ()),
}

TOOL = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}'
THOUGHT = "<think>\nlet me see\n</think>\n\nit is one"
NO_CALLS = "drops `tool_calls`|does not show the tool|must alternate|has no element|refuses these messages"
NO_REASONING = "drops `reasoning_content` of message 1"
IM = ["<|im_start|>", "<|im_end|>"]
OF_TURNS = ["<start_of_turn>", "<end_of_turn>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# family: (template, settings, special tokens, bos, eos, kind of tokenizer, {conversation: texts or a reason})
FAMILIES = {
    # The tokenizer itself puts a space behind BOS.
    "llama 2": (
        ("llama2", {}, [], "<s>", "</s>", "sentencepiece"),
        {
            "one": ["<s> [INST] one? [/INST]⟦ it is one </s>⟧"],
            "several": ["<s> [INST] one? [/INST]⟦ it is one </s>⟧<s> [INST] two? [/INST]⟦ it is two </s>⟧"],
            "system": ["<s> [INST] <<SYS>>\nbe brief\n<</SYS>>\n\none? [/INST]⟦ it is one </s>⟧"],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
            "thought in text": [f"<s> [INST] one? [/INST]⟦ {THOUGHT} </s>⟧"],
        },
    ),
    "llama 3": (
        ("llama3", {}, HEADERS, "<|begin_of_text|>", "<|eot_id|>", "byte_level"),
        {
            "one": [
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is one<|eot_id|>⟧"
            ],
            "several": [
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is one<|eot_id|>⟧"
                "<|start_header_id|>user<|end_header_id|>\n\ntwo?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is two<|eot_id|>⟧"
            ],
            "system": [
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is one<|eot_id|>⟧"
            ],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
            "thought in text": [
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
                f"<|start_header_id|>assistant<|end_header_id|>\n\n⟦{THOUGHT}<|eot_id|>⟧"
            ],
        },
    ),
    "llama 3.2": (
        ("llama3_2", {}, HEADERS, "<|begin_of_text|>", "<|eot_id|>", "byte_level"),
        {
            "one": [
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 31 Jan 2026\n\n<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is one<|eot_id|>⟧"
            ],
            "several": [
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 31 Jan 2026\n\n<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is one<|eot_id|>⟧"
                "<|start_header_id|>user<|end_header_id|>\n\ntwo?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is two<|eot_id|>⟧"
            ],
            "system": [
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 31 Jan 2026\n\nbe brief"
                "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is one<|eot_id|>⟧"
            ],
            "tools": [
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 31 Jan 2026\n\n<|eot_id|>"
                f"<|start_header_id|>user<|end_header_id|>\n\n{TOOL}\n\ncold?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
                '⟦{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>⟧'
                '<|start_header_id|>ipython<|end_header_id|>\n\n"3 C"<|eot_id|>'
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is cold<|eot_id|>⟧"
            ],
            "reasoning": NO_REASONING,
        },
    ),
    "llama 4": (
        ("llama4", {}, ["<|header_start|>", "<|header_end|>", "<|eot|>"], "<|begin_of_text|>", "<|eot|>", "byte_level"),
        {
            "one": [
                "<|begin_of_text|><|header_start|>user<|header_end|>\n\none?<|eot|>"
                "<|header_start|>assistant<|header_end|>\n\n⟦it is one<|eot|>⟧"
            ],
            "several": [
                "<|begin_of_text|><|header_start|>user<|header_end|>\n\none?<|eot|>"
                "<|header_start|>assistant<|header_end|>\n\n⟦it is one<|eot|>⟧"
                "<|header_start|>user<|header_end|>\n\ntwo?<|eot|>"
                "<|header_start|>assistant<|header_end|>\n\n⟦it is two<|eot|>⟧"
            ],
            "system": [
                "<|begin_of_text|><|header_start|>system<|header_end|>\n\nbe brief<|eot|>"
                "<|header_start|>user<|header_end|>\n\none?<|eot|>"
                "<|header_start|>assistant<|header_end|>\n\n⟦it is one<|eot|>⟧"
            ],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
        },
    ),
    "qwen 2.5": (
        ("qwen2_5", {}, IM, None, "<|im_end|>", "byte_level"),
        {
            "one": [
                "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
                "<|im_start|>assistant\n⟦it is one<|im_end|>⟧"
            ],
            "several": [
                "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
                "<|im_start|>assistant\n⟦it is one<|im_end|>⟧\n<|im_start|>user\ntwo?<|im_end|>\n"
                "<|im_start|>assistant\n⟦it is two<|im_end|>⟧"
            ],
            "system": [
                "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
                "<|im_start|>assistant\n⟦it is one<|im_end|>⟧"
            ],
            "tools": [
                f"<|im_start|>system\nYou are Qwen.\n{TOOL}<|im_end|>\n<|im_start|>user\ncold?<|im_end|>\n"
                '<|im_start|>assistant\n⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
                "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n3 C\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n⟦it is cold<|im_end|>⟧"
            ],
            "reasoning": NO_REASONING,
        },
    ),
    "qwen 3": (
        ("qwen3", {}, IM, None, "<|im_end|>", "byte_level"),
        {
            "one": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            # The empty thought stands before the last answer alone, so each turn is a sequence as it is sampled.
            "several": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧",
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nit is one<|im_end|>\n"
                "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is two<|im_end|>⟧",
            ],
            "system": [
                "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            "tools": [
                f"<|im_start|>system\n\n{TOOL}<|im_end|>\n<|im_start|>user\ncold?<|im_end|>\n"
                '<|im_start|>assistant\n<think>\n\n</think>\n\n⟦<tool_call>\n{"name": "weather", "arguments": '
                '{"city": "Oslo"}}\n</tool_call><|im_end|>⟧',
                f"<|im_start|>system\n\n{TOOL}<|im_end|>\n<|im_start|>user\ncold?<|im_end|>\n"
                '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
                "<|im_end|>\n<|im_start|>user\n<tool_response>\n3 C\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is cold<|im_end|>⟧",
            ],
            "reasoning": [f"<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦{THOUGHT}<|im_end|>⟧"],
            "thought in text": [f"<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦{THOUGHT}<|im_end|>⟧"],
        },
    ),
    "qwen 3 without thinking": (
        ("qwen3", {"enable_thinking": False}, IM, None, "<|im_end|>", "byte_level"),
        {
            "one": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            "several": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧",
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nit is one<|im_end|>\n"
                "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is two<|im_end|>⟧",
            ],
            "system": [
                "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            "tools": [
                f"<|im_start|>system\n\n{TOOL}<|im_end|>\n<|im_start|>user\ncold?<|im_end|>\n"
                '<|im_start|>assistant\n<think>\n\n</think>\n\n⟦<tool_call>\n{"name": "weather", "arguments": '
                '{"city": "Oslo"}}\n</tool_call><|im_end|>⟧',
                f"<|im_start|>system\n\n{TOOL}<|im_end|>\n<|im_start|>user\ncold?<|im_end|>\n"
                '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
                "<|im_end|>\n<|im_start|>user\n<tool_response>\n3 C\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is cold<|im_end|>⟧",
            ],
            "reasoning": "the prompt ends in an empty thought, and the reply has one of its own",
            "thought in text": "the prompt ends in an empty thought, and the reply has one of its own",
        },
    ),
    "qwen 3.5": (
        ("qwen3_5", {}, IM, None, "<|im_end|>", "byte_level"),
        {
            "one": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            "several": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧",
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nit is one<|im_end|>\n"
                "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is two<|im_end|>⟧",
            ],
            "system": [
                "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            "tools": [
                f"<|im_start|>system\n\n{TOOL}<|im_end|>\n<|im_start|>user\ncold?<|im_end|>\n"
                '<|im_start|>assistant\n<think>\n\n</think>\n\n⟦<tool_call>\n{"name": "weather", "arguments": '
                '{"city": "Oslo"}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n3 C\n</tool_response>'
                "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is cold<|im_end|>⟧"
            ],
            "reasoning": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n"
                "⟦let me see\n</think>\n\nit is one<|im_end|>⟧"
            ],
            "thought in text": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n"
                "⟦let me see\n</think>\n\nit is one<|im_end|>⟧"
            ],
        },
    ),
    "qwen 3.5 without thinking": (
        ("qwen3_5", {"enable_thinking": False}, IM, None, "<|im_end|>", "byte_level"),
        {
            "one": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            "several": [
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧",
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nit is one<|im_end|>\n"
                "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is two<|im_end|>⟧",
            ],
            "system": [
                "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is one<|im_end|>⟧"
            ],
            "tools": [
                f"<|im_start|>system\n\n{TOOL}<|im_end|>\n<|im_start|>user\ncold?<|im_end|>\n"
                '<|im_start|>assistant\n<think>\n\n</think>\n\n⟦<tool_call>\n{"name": "weather", "arguments": '
                '{"city": "Oslo"}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n3 C\n</tool_response>'
                "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦it is cold<|im_end|>⟧"
            ],
            "reasoning": "the prompt ends in an empty thought, and the reply has one of its own",
        },
    ),
    "gemma 2": (
        ("gemma2", {}, OF_TURNS, "<bos>", "<end_of_turn>", "metaspace"),
        {
            "one": ["<bos><start_of_turn>user\none?<end_of_turn>\n<start_of_turn>model\n⟦it is one<end_of_turn>⟧"],
            "several": [
                "<bos><start_of_turn>user\none?<end_of_turn>\n<start_of_turn>model\n⟦it is one<end_of_turn>⟧\n"
                "<start_of_turn>user\ntwo?<end_of_turn>\n<start_of_turn>model\n⟦it is two<end_of_turn>⟧"
            ],
            "system": "no system role",
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
        },
    ),
    "gemma 3": (
        ("gemma3", {}, OF_TURNS, "<bos>", "<end_of_turn>", "byte_level"),
        {
            "one": ["<bos><start_of_turn>user\none?<end_of_turn>\n<start_of_turn>model\n⟦it is one<end_of_turn>⟧"],
            "several": [
                "<bos><start_of_turn>user\none?<end_of_turn>\n<start_of_turn>model\n⟦it is one<end_of_turn>⟧\n"
                "<start_of_turn>user\ntwo?<end_of_turn>\n<start_of_turn>model\n⟦it is two<end_of_turn>⟧"
            ],
            "system": [
                "<bos><start_of_turn>user\nbe brief\n\none?<end_of_turn>\n"
                "<start_of_turn>model\n⟦it is one<end_of_turn>⟧"
            ],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
        },
    ),
    "mistral": (
        (
            "mistral",
            {},
            ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
            "<s>",
            "</s>",
            "metaspace",
        ),
        {
            "one": ["<s>[INST] one?[/INST]⟦ it is one</s>⟧"],
            "several": ["<s>[INST] one?[/INST]⟦ it is one</s>⟧[INST] two?[/INST]⟦ it is two</s>⟧"],
            "system": ["<s>[INST] be brief\n\none?[/INST]⟦ it is one</s>⟧"],
            "tools": [
                f"<s>[AVAILABLE_TOOLS] [{TOOL}][/AVAILABLE_TOOLS][INST] cold?[/INST]"
                '⟦[TOOL_CALLS] {"name": "weather", "arguments": {"city": "Oslo"}}</s>⟧[TOOL_RESULTS] 3 C[/TOOL_RESULTS]'
                "⟦ it is cold</s>⟧"
            ],
            "reasoning": NO_REASONING,
        },
    ),
    "phi 4": (
        ("phi4", {}, [*IM, "<|im_sep|>"], None, "<|im_end|>", "byte_level"),
        {
            "one": ["<|im_start|>user<|im_sep|>one?<|im_end|><|im_start|>assistant<|im_sep|>⟦it is one<|im_end|>⟧"],
            "several": [
                "<|im_start|>user<|im_sep|>one?<|im_end|><|im_start|>assistant<|im_sep|>⟦it is one<|im_end|>⟧"
                "<|im_start|>user<|im_sep|>two?<|im_end|><|im_start|>assistant<|im_sep|>⟦it is two<|im_end|>⟧"
            ],
            "system": [
                "<|im_start|>system<|im_sep|>be brief<|im_end|><|im_start|>user<|im_sep|>one?<|im_end|>"
                "<|im_start|>assistant<|im_sep|>⟦it is one<|im_end|>⟧"
            ],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
        },
    ),
    "deepseek v3": (
        (
            "deepseek_v3",
            {},
            ["<｜User｜>", "<｜Assistant｜>"],
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "byte_level",
        ),
        {
            "one": ["<｜begin▁of▁sentence｜><｜User｜>one?<｜Assistant｜>⟦it is one<｜end▁of▁sentence｜>⟧"],
            "several": [
                "<｜begin▁of▁sentence｜><｜User｜>one?<｜Assistant｜>⟦it is one<｜end▁of▁sentence｜>⟧"
                "<｜User｜>two?<｜Assistant｜>⟦it is two<｜end▁of▁sentence｜>⟧"
            ],
            "system": ["<｜begin▁of▁sentence｜>be brief<｜User｜>one?<｜Assistant｜>⟦it is one<｜end▁of▁sentence｜>⟧"],
            "tools": "does not show the tool 'weather'",
            "reasoning": NO_REASONING,
        },
    ),
    "deepseek r1": (
        (
            "deepseek_r1",
            {},
            ["<｜User｜>", "<｜Assistant｜>"],
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "byte_level",
        ),
        {
            "one": "the prompt ends in an open <think>, and the reply has no thought that would close it",
            "several": "the prompt ends in an open <think>, and the reply has no thought that would close it",
            "system": "the prompt ends in an open <think>, and the reply has no thought that would close it",
            "tools": NO_CALLS,
            "reasoning": [
                "<｜begin▁of▁sentence｜><｜User｜>one?<｜Assistant｜><think>\n"
                "⟦let me see\n</think>\n\nit is one<｜end▁of▁sentence｜>⟧"
            ],
            "thought in text": [
                "<｜begin▁of▁sentence｜><｜User｜>one?<｜Assistant｜><think>\n"
                "⟦let me see\n</think>\n\nit is one<｜end▁of▁sentence｜>⟧"
            ],
        },
    ),
    "glm 4": (
        (
            "glm4",
            {},
            ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"],
            None,
            "<|endoftext|>",
            "byte_level",
        ),
        {
            "one": ["[gMASK]<sop><|user|>\none?<|assistant|>\n<think></think>\n⟦it is one<|endoftext|>⟧"],
            # Turns end where the next one begins; the last ends with the end token.
            "several": [
                "[gMASK]<sop><|user|>\none?<|assistant|>\n<think></think>\n⟦it is one⟧<|user|>\ntwo?"
                "<|assistant|>\n<think></think>\n⟦it is two<|endoftext|>⟧"
            ],
            "system": [
                "[gMASK]<sop><|system|>\nbe brief<|user|>\none?<|assistant|>\n<think></think>\n⟦it is one<|endoftext|>⟧"
            ],
            "tools": [
                f"[gMASK]<sop><|system|>\n{TOOL}<|user|>\ncold?<|assistant|>\n<think></think>\n"
                "⟦<tool_call>weather\ncity: Oslo\n</tool_call>⟧<|observation|>\n3 C<|assistant|>\n<think></think>\n"
                "⟦it is cold<|endoftext|>⟧"
            ],
            "reasoning": [
                "[gMASK]<sop><|user|>\none?<|assistant|>⟦\n<think>let me see</think>\nit is one<|endoftext|>⟧"
            ],
        },
    ),
    "smollm 3": (
        ("smollm3", {}, IM, None, "<|im_end|>", "byte_level"),
        {
            "one": [
                "<|im_start|>system\nToday Date: 31 January 2026\nReasoning Mode: /think\n\n<|im_end|>\n"
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦it is one<|im_end|>⟧"
            ],
            "several": [
                "<|im_start|>system\nToday Date: 31 January 2026\nReasoning Mode: /think\n\n<|im_end|>\n"
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦it is one<|im_end|>⟧\n"
                "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n⟦it is two<|im_end|>⟧"
            ],
            "system": [
                "<|im_start|>system\nToday Date: 31 January 2026\nReasoning Mode: /think\n\nbe brief<|im_end|>\n"
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦it is one<|im_end|>⟧"
            ],
            "thought in text": [
                "<|im_start|>system\nToday Date: 31 January 2026\nReasoning Mode: /think\n\n<|im_end|>\n"
                f"<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦{THOUGHT}<|im_end|>⟧"
            ],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
        },
    ),
    "smollm 3 without thinking": (
        ("smollm3", {"enable_thinking": False}, IM, None, "<|im_end|>", "byte_level"),
        {
            "one": [
                "<|im_start|>system\nToday Date: 31 January 2026\nReasoning Mode: /no_think\n\n<|im_end|>\n"
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n⟦it is one<|im_end|>⟧"
            ],
            "several": [
                "<|im_start|>system\nToday Date: 31 January 2026\nReasoning Mode: /no_think\n\n<|im_end|>\n"
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n⟦it is one<|im_end|>⟧\n"
                "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n⟦it is two<|im_end|>⟧"
            ],
            "system": [
                "<|im_start|>system\nToday Date: 31 January 2026\nReasoning Mode: /no_think\n\nbe brief<|im_end|>\n"
                "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n⟦it is one<|im_end|>⟧"
            ],
            "tools": NO_CALLS,
            "reasoning": "the prompt ends in an empty thought, and the reply has one of its own",
        },
    ),
    "olmo 2": (
        ("olmo2", {}, [], "<|endoftext|>", "<|endoftext|>", "byte_level"),
        {
            "one": ["<|endoftext|><|user|>\none?\n<|assistant|>\n⟦it is one<|endoftext|>⟧"],
            "several": [
                "<|endoftext|><|user|>\none?\n<|assistant|>\n⟦it is one<|endoftext|>⟧\n<|user|>\ntwo?\n"
                "<|assistant|>\n⟦it is two<|endoftext|>⟧"
            ],
            "system": ["<|endoftext|><|system|>\nbe brief\n<|user|>\none?\n<|assistant|>\n⟦it is one<|endoftext|>⟧"],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
        },
    ),
    "command r": (
        (
            "command_r",
            {},
            [
                "<|START_OF_TURN_TOKEN|>",
                "<|END_OF_TURN_TOKEN|>",
                "<|USER_TOKEN|>",
                "<|CHATBOT_TOKEN|>",
                "<|SYSTEM_TOKEN|>",
            ],
            "<BOS_TOKEN>",
            "<|END_OF_TURN_TOKEN|>",
            "byte_level",
        ),
        {
            "one": [
                "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>one?<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦it is one<|END_OF_TURN_TOKEN|>⟧"
            ],
            "several": [
                "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>one?<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦it is one<|END_OF_TURN_TOKEN|>⟧"
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>two?<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦it is two<|END_OF_TURN_TOKEN|>⟧"
            ],
            "system": [
                "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>be brief<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>one?<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦it is one<|END_OF_TURN_TOKEN|>⟧"
            ],
            "tools": NO_CALLS,
            "reasoning": NO_REASONING,
        },
    ),
    "gpt-oss": (
        (
            "gpt_oss",
            {},
            ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"],
            None,
            "<|return|>",
            "byte_level",
        ),
        {
            "one": [
                "<|start|>system<|message|>Current date: 2026-01-31<|end|><|start|>user<|message|>one?<|end|>"
                "<|start|>assistant⟦<|channel|>final<|message|>it is one<|return|>⟧"
            ],
            # The end of a turn is another token once a turn follows.
            "several": [
                "<|start|>system<|message|>Current date: 2026-01-31<|end|><|start|>user<|message|>one?<|end|>"
                "<|start|>assistant⟦<|channel|>final<|message|>it is one<|return|>⟧",
                "<|start|>system<|message|>Current date: 2026-01-31<|end|><|start|>user<|message|>one?<|end|>"
                "<|start|>assistant<|channel|>final<|message|>it is one<|end|><|start|>user<|message|>two?<|end|>"
                "<|start|>assistant⟦<|channel|>final<|message|>it is two<|return|>⟧",
            ],
            "system": [
                "<|start|>system<|message|>Current date: 2026-01-31<|end|><|start|>developer<|message|>be brief<|end|>"
                "<|start|>user<|message|>one?<|end|>"
                "<|start|>assistant⟦<|channel|>final<|message|>it is one<|return|>⟧"
            ],
            "tools": [
                "<|start|>system<|message|>Current date: 2026-01-31<|end|>"
                f"<|start|>developer<|message|>\n{TOOL}<|end|><|start|>user<|message|>cold?<|end|>"
                '<|start|>assistant⟦ to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}'
                '<|call|>⟧<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"3 C"<|end|>'
                "<|start|>assistant⟦<|channel|>final<|message|>it is cold<|return|>⟧"
            ],
            "reasoning": [
                "<|start|>system<|message|>Current date: 2026-01-31<|end|><|start|>user<|message|>one?<|end|>"
                "<|start|>assistant⟦<|channel|>analysis<|message|>let me see<|end|>"
                "<|start|>assistant<|channel|>final<|message|>it is one<|return|>⟧"
            ],
        },
    ),
    "granite": (
        (
            "granite",
            {},
            ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"],
            None,
            "<|end_of_text|>",
            "byte_level",
        ),
        {
            "one": [
                "<|start_of_role|>system<|end_of_role|>Today's Date: January 31, 2026.<|end_of_text|>\n"
                "<|start_of_role|>user<|end_of_role|>one?<|end_of_text|>\n"
                "<|start_of_role|>assistant<|end_of_role|>⟦it is one<|end_of_text|>⟧"
            ],
            "several": [
                "<|start_of_role|>system<|end_of_role|>Today's Date: January 31, 2026.<|end_of_text|>\n"
                "<|start_of_role|>user<|end_of_role|>one?<|end_of_text|>\n"
                "<|start_of_role|>assistant<|end_of_role|>⟦it is one<|end_of_text|>⟧\n"
                "<|start_of_role|>user<|end_of_role|>two?<|end_of_text|>\n"
                "<|start_of_role|>assistant<|end_of_role|>⟦it is two<|end_of_text|>⟧"
            ],
            "system": [
                "<|start_of_role|>system<|end_of_role|>be brief<|end_of_text|>\n"
                "<|start_of_role|>user<|end_of_role|>one?<|end_of_text|>\n"
                "<|start_of_role|>assistant<|end_of_role|>⟦it is one<|end_of_text|>⟧"
            ],
            "tools": [
                "<|start_of_role|>system<|end_of_role|>Today's Date: January 31, 2026.<|end_of_text|>\n"
                f"<|start_of_role|>tools<|end_of_role|>[{TOOL}]<|end_of_text|>\n"
                "<|start_of_role|>user<|end_of_role|>cold?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
                '⟦<|tool_call|>{"name": "weather", "arguments": {"city": "Oslo"}}<|end_of_text|>⟧\n'
                "<|start_of_role|>tool<|end_of_role|>3 C<|end_of_text|>\n"
                "<|start_of_role|>assistant<|end_of_role|>⟦it is cold<|end_of_text|>⟧"
            ],
            "reasoning": NO_REASONING,
        },
    ),
}
SWEPT = ("one", "several", "system", "tools", "reasoning")
CASES = [(family, name) for family, (_, expected) in FAMILIES.items() for name in expected]


@pytest.fixture(scope="module")
def renderer_of(family_tokenizer):
    @cache
    def make(family: str) -> Renderer:
        template, settings, specials, bos, eos, kind = FAMILIES[family][0]
        text = with_defaults((TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8"), settings)
        text = with_clock(text, date(2026, 1, 31)) if "strftime_now" in text else text
        return Renderer(family_tokenizer(kind, specials, bos=bos, eos=eos, template=text))

    return make


def test_every_family_has_an_expectation_for_every_kind():
    assert {family: [name for name in SWEPT if name not in texts] for family, (_, texts) in FAMILIES.items()} == {
        family: [] for family in FAMILIES
    }


@pytest.mark.parametrize(("family", "name"), CASES)
def test_families(renderer_of, family, name):
    renderer, expected = renderer_of(family), FAMILIES[family][1][name]
    prompt, completion, tools = CONVERSATIONS[name]
    example = Example(Problem("p", tuple(prompt), where="f:3", tools=tools), tuple(completion))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected) as error:
            renderer.samples(example)
        assert error.value.where == "f:3" and re.search("model.chat_template|model.template_kwargs", error.value.hint)
        return
    samples = renderer.samples(example)
    pieces = [renderer.encoder.pieces(sample.ids, sample.loss_mask) for sample in samples]
    shown = ["".join(f"⟦{text}⟧" if on else text for text, on in each) for each in pieces]
    assert shown == expected
    for sample, text in zip(samples, expected, strict=True):
        # The mask is right token by token, and the ids are those of the whole text.
        pieces = text.replace("⟧", "⟦").split("⟦")
        if renderer.encoder.puts_space:
            continue
        assert sample.ids == [token for piece in pieces for token in renderer.encoder.encode(piece)]
        lengths = [len(renderer.encoder.encode(piece)) for piece in pieces]
        assert sample.loss_mask == [index % 2 for index, length in enumerate(lengths) for _ in range(length)]
        assert sample.ids == renderer.encoder.encode("".join(pieces))
    prompt_ids = renderer.prompt_ids(example.problem)
    assert samples[0].ids[: samples[0].prompt_length] == prompt_ids


ANOTHER = (
    "{% for t in tools or [] %}{{ '<|im_start|>tool\n' + t | tojson + '<|im_end|>\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if isinstance(FAMILIES[case[0]][1][case[1]], str)])
def test_another_template_is_a_way_out(family_tokenizer, family, name):
    """What a family's own template refuses is trained on with `model.chat_template`."""
    _, _, specials, bos, eos, kind = FAMILIES[family][0]
    made = Renderer(family_tokenizer(kind, [*specials, *IM], bos=bos, eos=eos, template=ANOTHER))
    prompt, completion, tools = CONVERSATIONS[name]
    [sample] = made.samples(Example(Problem("p", tuple(prompt), where="f:3", tools=tools), tuple(completion)))
    runs = [text for text, on in made.encoder.pieces(sample.ids, sample.loss_mask) if on]
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    expected = {
        "system": ["it is one"],
        "tools": [call, "it is cold"],
        "reasoning": ["<think>let me see</think>it is one"],
        "thought in text": [THOUGHT],
        "one": ["it is one"],
        "several": ["it is one", "it is two"],
    }
    assert [run.replace(" ", "") for run in runs] == [f"{text}<|im_end|>".replace(" ", "") for text in expected[name]]
