"""From problems and examples to token ids: chat templates, BOS and EOS, and the mask of what is trained on.

One renderer serves training, rollouts and evaluation, so that a prompt has the same ids in all of them.

Plain text. The prompt is tokenized with what the tokenizer puts in front of text (BOS), unless the text begins with it
already, and without what it would put behind. The completion is tokenized on its own and joined by ids, because that is
what sampling does: the model continues the prompt's ids. Tokenizing the joined text may give other ids at the boundary;
those are never used. An end token follows the completion, unless it ends with one.

Chat. A text prompt is wrapped as a user message, a text completion as an assistant message; the template decides about
BOS. The prompt ends with the template's generation prompt, or, if its last message is the assistant's, inside that
message, which the completion then continues. Every assistant turn of the completion is trained on, from behind the
generation prompt to the turn's end token inclusive; what the template puts behind that token is cut at the end of the
sample and masked between turns. If the template ends turns without a token, the sample ends with the tokenizer's EOS.
An assistant turn of weight 0 is context like the turns of others, and its calls of tools are trained on like its text.

The template must render a conversation so that it begins with the rendered prompt, and a longer conversation so that it
begins with the shorter one. A template that rewrites earlier turns (for example strips their reasoning) would train on
tokens that sampling never sees; that is an error which shows the first difference.

Masks follow from positions. No token value is looked at for them, so a pad token may equal the end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from posttrain.data.messages import is_context, says_nothing
from posttrain.data.sample import Example, Message, Origin, Problem, Sample
from posttrain.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERER_VERSION = 1
"""Raised whenever the same text would give other ids."""

_PROBE = "posttrain renders one probe answer"


@dataclass(frozen=True, slots=True)
class _TurnEnd:
    """How the template ends the last assistant turn: the end token and the text behind it."""

    id: int
    token: str
    rest: str


class Renderer:
    """Renders with one tokenizer.

    Args:
        tokenizer: with an EOS token; its chat template is used if it has one.
        chat_template_allowed: False treats the tokenizer as if it had no chat template.
        generation_eos: end tokens of the model's generation config, which also stop sampling.

    Raises:
        ModelError: no EOS token, or a chat template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_allowed: bool = True,
        generation_eos: int | Sequence[int] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token", where="model.path")
        self.tokenizer = tokenizer
        self._generation_eos = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or ())
        self._template = _default_template(tokenizer) if chat_template_allowed else None
        self._front = _front_ids(tokenizer)
        self._turn_end = None if self._template is None else self._find_turn_end()

    # ------------------------------------------------------------------------------------------------- public

    def prompt_ids(self, problem: Problem) -> list[int]:
        """Token ids of the prompt, generation prompt included; not empty.

        Raises:
            DataError: chat without a template, or messages that the template refuses.
        """
        messages = self._prompt_messages(problem)
        if messages is None:
            return self._plain_prompt(problem)
        return self._chat_ids([self._prompt_text(messages, problem)], problem.where)[0]

    def sample(self, example: Example) -> Sample:
        """The example as one sequence, with the completion and its end token trained on. Origin: expert.

        Raises:
            DataError: as `prompt_ids`; an empty completion; or a template whose renderings do not extend each other.
        """
        problem = example.problem
        messages = self._prompt_messages(problem)
        if messages is None:
            segments = [self._plain_prompt(problem), self._plain_completion(example)]
        else:
            segments = self._chat_segments(messages, example)
        return Sample(
            ids=[token for segment in segments for token in segment],
            loss_mask=[index % 2 for index, segment in enumerate(segments) for _ in segment],
            origin=Origin.EXPERT,
            problem_id=problem.id,
        )

    def conversation(self, example: Example) -> Sample:
        """The example as sequence classifiers read it, whole: text with its end token, a chat as the template has it.

        As `sample`, but a chat ends with what the template writes behind the last reply, which is not trained on, and
        has no end token that the template lacks. Errors as for `sample`.
        """
        sample = self.sample(example)
        if self._prompt_messages(example.problem) is None:
            return sample
        if self._turn_end is None:
            return replace(sample, ids=sample.ids[:-1], loss_mask=sample.loss_mask[:-1])
        rest = self._encode(self._turn_end.rest)
        return replace(sample, ids=sample.ids + rest, loss_mask=sample.loss_mask + [0] * len(rest))

    def text(self, ids: Sequence[int]) -> str:
        """Text of token ids: special tokens removed, spaces as they are."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a completion: EOS, the template's end of turn, and the generation config's; each once."""
        turn = [] if self._turn_end is None else [self._turn_end.id]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *turn, *self._generation_eos]))

    @cached_property
    def head_ids(self) -> list[int]:
        """What `data.truncation` should leave at the front of a prompt that it cuts: BOS, where it is used."""
        bos = self.tokenizer.bos_token_id
        return self._front or ([] if bos is None else [bos])

    @cached_property
    def template_hash(self) -> str:
        """SHA-256 over all that decides the rendering beside the vocabulary; equal hashes, equal renderings."""
        parts = {
            "version": RENDERER_VERSION,
            "template": self._template,
            "special_tokens": self.tokenizer.special_tokens_map,
            "front": self._front,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    # -------------------------------------------------------------------------------------------------- plain

    def _plain_prompt(self, problem: Problem) -> list[int]:
        ids = self._encode(problem.prompt)
        if ids[: len(self._front)] != self._front:
            ids = self._front + ids
        return self._checked_prompt(ids, problem.where)

    def _plain_completion(self, example: Example) -> list[int]:
        where = example.problem.where
        if not isinstance(example.completion, str):
            raise DataError("the completion is chat messages, but the prompt is plain text", where=where)
        ids = self._encode(example.completion)
        eos = self.tokenizer.eos_token_id
        if ids and ids[-1] == eos:
            ids.pop()
        if not ids:
            raise DataError("the completion is empty", where=where)
        return [*ids, eos]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _checked_prompt(self, ids: list[int], where: str) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if not ids:
            raise DataError("the prompt has no tokens", where=where)
        # Where BOS is also the end token, a text may well begin with two of them.
        if bos is not None and bos != self.tokenizer.eos_token_id and ids[:2] == [bos, bos]:
            raise DataError(
                f"the prompt begins with two {self.tokenizer.bos_token!r} tokens",
                where=where,
                hint="leave the token out of the text, or out of the chat template",
            )
        return ids

    # --------------------------------------------------------------------------------------------------- chat

    def _prompt_messages(self, problem: Problem) -> tuple[Message, ...] | None:
        """The prompt as messages, or None where it is rendered as plain text."""
        plain = isinstance(problem.prompt, str)
        if plain and (problem.chat is False or (problem.chat is None and self._template is None)):
            return None
        if self._template is None:
            raise DataError(
                "the prompt is a chat, but there is no chat template",
                where=problem.where,
                hint="use a model whose tokenizer has one, or text prompts with `chat: false`",
            )
        return ({"role": "user", "content": problem.prompt},) if plain else problem.prompt

    def _render(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        tools: Sequence[dict[str, Any]] = (),
        generation: bool = False,
        open_end: bool = False,
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [{key: item for key, item in message.items() if key != "weight"} for message in messages],
                tools=list(tools) or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation,
                continue_final_message=open_end,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A template is a program of the model's makers: what Python raises inside it is its own.
            raise DataError(f"the chat template refuses these messages: {error}", where=where) from error

    def _prompt_text(self, messages: Sequence[Message], problem: Problem) -> str:
        prefilled = messages[-1]["role"] == "assistant"
        return self._render(messages, problem.where, tools=problem.tools, generation=not prefilled, open_end=prefilled)

    def _chat_segments(self, prompt: tuple[Message, ...], example: Example) -> list[list[int]]:
        """Ids in turn masked and trained: prompt, assistant turn, what stands between, assistant turn, ..."""
        where, tools = example.problem.where, example.problem.tools
        messages, first = _joined(prompt, example)
        texts: list[str] = []
        for index in range(first, len(messages)):
            message = messages[index]
            if message["role"] != "assistant" or is_context(message):
                continue
            if says_nothing(message):
                raise DataError("the completion is empty", where=where)
            if index == first:
                texts.append(self._prompt_text(prompt, example.problem))
            else:  # a turn of its own, also where the turn before it is the assistant's
                texts.append(self._render(messages[:index], where, tools=tools, generation=True))
            texts.append(self._without_rest(self._render(messages[: index + 1], where, tools=tools), where))
        if messages[-1]["role"] != "assistant" or not texts:
            reason = "does not end with an assistant message" if texts else "has no assistant message with loss"
            raise DataError(f"the completion {reason}", where=where)
        segments = self._chat_ids(texts, where)
        for segment in segments[1::2]:
            if self._turn_end is not None and segment[-1:] != [self._turn_end.id]:
                raise DataError(f"an assistant turn does not end with {self._turn_end.token!r}", where=where)
        if self._turn_end is None:
            segments[-1].append(self.tokenizer.eos_token_id)
        return segments

    def _without_rest(self, text: str, where: str) -> str:
        if self._turn_end is None:
            return text
        if not text.endswith(self._turn_end.token + self._turn_end.rest):
            raise DataError(
                f"the chat template ends this assistant turn with {text[-40:]!r}, others with "
                f"{self._turn_end.token + self._turn_end.rest!r}",
                where=where,
            )
        return text.removesuffix(self._turn_end.rest)

    def _chat_ids(self, texts: Sequence[str], where: str) -> list[list[int]]:
        """Ids of the pieces between growing texts, each of which begins with the one before.

        The longest text is tokenized as a whole. If a boundary does not fall between two of its tokens, the pieces are
        tokenized apart, as sampling would see them.
        """
        for shorter, longer in zip(texts, texts[1:], strict=False):
            if not longer.startswith(shorter):
                raise self._not_a_prefix(shorter, longer, where)
        whole, bounds = self._encode(texts[-1]), [0]
        for text in texts[:-1]:
            start = self._encode(text)
            if whole[: len(start)] != start:
                pieces = [new[len(old) :] for old, new in zip(["", *texts], texts, strict=False)]
                segments = [self._encode(piece) for piece in pieces]
                break
            bounds.append(len(start))
        else:
            segments = [whole[start:end] for start, end in zip(bounds, [*bounds[1:], len(whole)], strict=True)]
        self._checked_prompt(segments[0], where)
        return segments

    def _not_a_prefix(self, shorter: str, longer: str, where: str) -> DataError:
        left, right = self._encode(shorter), self._encode(longer)
        at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
        shown = [self.tokenizer.decode(ids[max(at - 4, 0) : at + 6]) for ids in (left, right)]
        return DataError(
            f"the chat template renders the start of the conversation differently once a reply follows: at token {at}, "
            f"{shown[0]!r} becomes {shown[1]!r}",
            where=where,
            hint="use a template that leaves earlier turns as they are, or plain text with `chat: false`",
        )

    def _find_turn_end(self) -> _TurnEnd | None:
        """The first added token behind a reply, if there is one: the template's end of turn."""
        where = "tokenizer.chat_template"
        text = self._render([{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}], where)
        _, found, tail = text.rpartition(_PROBE)
        if not found:
            raise ModelError("the chat template leaves out what the assistant says", where=where)
        ends = {int(token) for token in self.tokenizer.added_tokens_decoder} | set(self.tokenizer.all_special_ids)
        for token_id in self._encode(tail):
            token = str(self.tokenizer.convert_ids_to_tokens(token_id))
            # Some vocabularies hold runs of white space as added tokens; they end nothing. Nor does the unknown token.
            if token_id in ends and token.strip() and token in tail:
                return _TurnEnd(token_id, token, tail[tail.index(token) + len(token) :])
        return None


def _joined(prompt: tuple[Message, ...], example: Example) -> tuple[tuple[Message, ...], int]:
    """The whole conversation, and the index of the first message that is trained on."""
    completion = example.completion
    if prompt[-1]["role"] == "assistant":
        if not isinstance(completion, str):
            raise DataError(
                "the prompt ends inside an assistant message, so the completion must be text",
                where=example.problem.where,
            )
        if not completion.strip():
            raise DataError("the completion is empty", where=example.problem.where)
        last = {**prompt[-1], "content": prompt[-1]["content"] + completion}
        return (*prompt[:-1], last), len(prompt) - 1
    if isinstance(completion, str):
        completion = ({"role": "assistant", "content": completion},)
    if not completion or completion[0]["role"] != "assistant":
        raise DataError("the completion does not begin with an assistant message", where=example.problem.where)
    return (*prompt, *completion), len(prompt)


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError("the tokenizer has several chat templates and none is called default") from error


def _front_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of text (BOS, if anything)."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    starts = range(len(full) - len(bare) + 1)
    start = next((index for index in starts if full[index : index + len(bare)] == bare), 0)
    return full[:start]
