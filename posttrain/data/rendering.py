"""From problems and examples to token ids: chat templates, BOS and EOS, and the mask of what is trained on.

One renderer serves training, rollouts and evaluation, so that a prompt has the same ids in all of them.

Plain text. The prompt is tokenized with what the tokenizer puts in front of text (BOS), unless the text begins with it
already, and without what it would put behind. The completion is tokenized on its own and joined by ids, because that is
what sampling does: the model continues the prompt's ids. Tokenizing the joined text may give other ids at the boundary;
those are never used. An end token follows the completion, unless it ends with one; within it there is none.

Chat. A text prompt is wrapped as a user message, a text completion as an assistant message; the template decides about
BOS. The prompt ends with the template's generation prompt (or the header that a template without one writes before
replies), or, if its last message is the assistant's, inside that message, which the completion then continues. Every
assistant turn of the completion is trained on, from behind the generation prompt to the turn's end token inclusive;
what the template puts behind that token is cut at the end of the sample and masked between turns. If the template ends
turns without a token, the sample ends with the tokenizer's EOS. An assistant turn of weight 0 is context like the turns
of others; calls of tools are trained on like text.

A trained turn is what the model is to write behind its prompt, and the prompt is what sampling would give it:

- What the template writes in place of a reasoning that the row lacks (an empty `<think></think>`) nobody said. If the
  generation prompt holds it, it is prompt; else it is context that is not trained on, and `notices` tells of it.
- A template that drops a part of a text reply, or has a generation prompt that finished turns lack, as templates of
  reasoning models do: the reply stands behind the prompt as it is written, with the end token behind it. A part that
  only the template could write, such as a `reasoning_content` that it does not know, is an error.
- A template that renders earlier turns otherwise once others follow (it strips their reasoning, say) has no one
  sequence in which all of them stand as at inference. `samples` then gives several, each with the turns that agree.

Masks follow from positions: of rendered texts that grow by a turn, each beginning with the one before. No token value
is looked at for them, so a pad token may equal the end token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from posttrain.data.chat import ChatTemplate
from posttrain.data.encoding import Encoder
from posttrain.data.messages import REASONING, is_context, says_nothing
from posttrain.data.sample import Example, Message, Origin, Problem, Sample
from posttrain.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERER_VERSION = 2
"""Raised whenever the same text would give other ids."""

_END_OF_THOUGHT = re.compile(r"</think>|\[/THINK\]")


@dataclass(slots=True)
class _Chain:
    """Rendered texts that each begin with the one before: prompt, prompt with reply, up to the next reply, ...

    Attributes:
        texts: even ones end where a reply begins, odd ones where it ends.
        inserted: what the template has put between the generation prompt and the first reply.
    """

    texts: list[str]
    inserted: str


class Renderer:
    """Renders with one tokenizer.

    Args:
        tokenizer: with an EOS token; its chat template is used if it has one.
        chat_template_allowed: False treats the tokenizer as if it had no chat template.
        generation_eos: end tokens of the model's generation config, which also stop sampling.
        count_few: leave out the ids of prompts that fit in any case (`data.few_prompts`): for who trains on none.

    Raises:
        ModelError: no EOS token, or a chat template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_allowed: bool = True,
        generation_eos: int | Sequence[int] | None = None,
        count_few: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token", where="model.path")
        self.tokenizer = tokenizer
        # A tokenizer of a model that is loaded with pictures brings what writes them (`models.processor`).
        self.pictures = getattr(tokenizer, "pictures", None)
        self.encoder = Encoder(tokenizer) if self.pictures is None else self.pictures.encoder(tokenizer)
        self._generation_eos = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or ())
        self._front = _front_ids(tokenizer)
        text = _default_template(tokenizer) if chat_template_allowed else None
        stops = [tokenizer.eos_token_id, *self._generation_eos]
        template = ChatTemplate if self.pictures is None else self.pictures.template
        self.template = None if text is None else template(text, self.encoder, stops)
        self._noticed: Counter[str] = Counter()
        self.counts_few = count_few and self.pictures is None and self.encoder.byte_level

    # ------------------------------------------------------------------------------------------------- public

    def prompt_ids(self, problem: Problem) -> list[int]:
        """Token ids of the prompt, generation prompt included; not empty.

        Raises:
            DataError: chat without a template, or messages that the template refuses or leaves out.
        """
        return self.encoded_prompt(self.prompt_text(problem), problem)

    def prompt_text(self, problem: Problem) -> str:
        """The prompt as it is encoded.

        Raises:
            DataError: as `prompt_ids`.
        """
        messages = self._prompt_messages(problem)
        if messages is None:
            assert isinstance(problem.prompt, str)  # a chat is rendered by the template
            return problem.prompt
        self._check_typed(messages, problem.where)
        return self._prompt_text(messages, problem)

    def encoded_prompt(self, text: str, problem: Problem) -> list[int]:
        """Ids of a prompt, of which `prompt_text` has given the text.

        Raises:
            DataError: it has no tokens, or begins with two BOS tokens.
        """
        if self._prompt_messages(problem) is None:
            return self._plain_prompt(problem)
        return self._chat_ids([text], problem.where)[0]

    def most_tokens(self, text: str) -> int:
        """Tokens that the text of a prompt has at most, where the vocabulary is byte-level."""
        return len(text.encode()) + len(self._front) + 1  # and a space in front

    def surely_begins_well(self, text: str) -> bool:
        """Whether the prompt has tokens, and does not begin with two BOS tokens."""
        bos = self.tokenizer.bos_token
        return bool(text) and (bos is None or text.count(bos, 0, 4 * len(bos)) < 2)

    def sample(self, example: Example) -> Sample:
        """The example as one sequence, with the completion and its end token trained on. Origin: expert.

        Raises:
            DataError: as `prompt_ids`; an empty completion; a completion that the template drops a part of; or several
                trained turns of which the template renders earlier ones otherwise once others follow.
        """
        samples, chains = self._samples(example)
        if len(samples) > 1:
            raise self._not_a_prefix(chains[0].texts[-1], chains[1].texts[0], example.problem.where)
        return samples[0]

    def samples(self, example: Example) -> list[Sample]:
        """The example as the fewest sequences in which every trained turn stands as at inference; mostly one.

        Raises:
            DataError: as `sample`, but for the last reason.
        """
        samples, _ = self._samples(example)
        if len(samples) > 1:
            self._notice("conversations of which the template renders earlier turns otherwise: one sequence per turn")
        return samples

    def conversation(self, example: Example) -> Sample:
        """The example as sequence classifiers read it, whole: text with its end token, a chat as the template has it.

        As `sample`, but a chat ends with what the template writes behind the last reply, which is not trained on, and
        has no end token that the template lacks. Errors as for `sample`.
        """
        sample = self.sample(example)
        if self._prompt_messages(example.problem) is None:
            return sample
        end = self.template.turn_end
        if end is None:
            return replace(sample, ids=sample.ids[:-1], loss_mask=sample.loss_mask[:-1])
        rest = self.encoder.behind(end.rest)
        return replace(sample, ids=sample.ids + rest, loss_mask=sample.loss_mask + [0] * len(rest))

    def text(self, ids: Sequence[int]) -> str:
        """Text of a completion's token ids: special tokens removed, spaces as they are."""
        return self.encoder.text(ids)

    def shown(self, ids: Sequence[int]) -> str:
        """Text of token ids for people: special tokens as they are written, pictures by what is in them."""
        if self.pictures is not None:
            return self.encoder.text(ids, special=True)
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def pixels(self, rows: Iterable[Sequence[int]]) -> int:
        """Pixels that a model looks at for rows of a pass, of each picture once; 0 for models of text."""
        return 0 if self.pictures is None else self.pictures.pixels(rows)

    def notices(self) -> list[str]:
        """What somebody should know of the rows rendered so far, each with how often it was met."""
        clock = [] if self.template is None else self.template.clock.values()
        found = [f"{what} ({count} times)" for what, count in self._noticed.items()]
        if clock:
            found.insert(
                0,
                f"the chat template reads the clock ({', '.join(clock)}): it renders otherwise on another day, when a "
                "resume is refused and reports are not comparable; model.template_date makes the clock stand still",
            )
        return found

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a completion: EOS, the template's end of turn, and the generation config's; each once."""
        end = None if self.template is None else self.template.turn_end
        turn = [] if end is None else [end.id]
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
            "template": None if self.template is None else self.template.text,
            "clock": self.clock,
            "special_tokens": self.tokenizer.special_tokens_map,
            "front": self._front,
        } | ({} if self.pictures is None else {"pictures": self.pictures.settings()})
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def clock(self) -> dict[str, str]:
        """What the chat template has read from the clock, by the form that it asked for; empty if it reads none."""
        return {} if self.template is None else self.template.clock

    # -------------------------------------------------------------------------------------------------- plain

    def _plain_prompt(self, problem: Problem) -> list[int]:
        assert isinstance(problem.prompt, str)  # a chat is rendered by the template
        ids = self.encoder.encode(problem.prompt)
        if ids[: len(self._front)] != self._front:
            ids = self._front + ids
        return self._checked_prompt(ids, problem.where)

    def _plain_completion(self, example: Example) -> list[int]:
        where = example.problem.where
        if not isinstance(example.completion, str):
            raise DataError("the completion is chat messages, but the prompt is plain text", where=where)
        ids = self.encoder.behind(example.completion, where)
        end = ids.pop() if ids and ids[-1] in self.stop_ids else self.tokenizer.eos_token_id
        if not ids:
            raise DataError("the completion is empty", where=where)
        inner = next((token for token in ids if token in self.stop_ids), None)
        if inner is not None:
            token = self.tokenizer.convert_ids_to_tokens(inner)
            raise DataError(
                f"the completion holds {token!r}, which ends a completion, before its end",
                where=where,
                hint="take it out of the text, or leave the row out",
            )
        return [*ids, end]

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
        if plain and (problem.chat is False or (problem.chat is None and self.template is None)):
            return None
        if self.template is None:
            raise DataError(
                "the prompt is a chat, but there is no chat template",
                where=problem.where,
                hint="give one as `model.chat_template`, or use text prompts with `chat: false`",
            )
        return ({"role": "user", "content": problem.prompt},) if isinstance(problem.prompt, str) else problem.prompt

    def _prompt_text(self, messages: Sequence[Message], problem: Problem) -> str:
        prefilled = messages[-1]["role"] == "assistant"
        return self.template.prompt(messages, problem.where, tools=problem.tools, prefilled=prefilled)

    def _check_typed(self, messages: Sequence[Message], where: str) -> None:
        self.template.check_typed(messages, where)
        for word in self.template.typed_words(messages):
            self._notice(f"{word!r} typed into a message is encoded as text, not as that token")

    def _notice(self, what: str) -> None:
        self._noticed[what] += 1

    def _samples(self, example: Example) -> tuple[list[Sample], list[_Chain]]:
        problem = example.problem
        messages = self._prompt_messages(problem)
        chains: list[_Chain] = []
        if messages is None:
            sequences = [[self._plain_prompt(problem), self._plain_completion(example)]]
        else:
            chains = self._chains(messages, example)
            sequences = [self._chat_segments(chain, problem.where) for chain in chains]
        if self.pictures is not None:
            for segments in sequences:
                self.pictures.refuse_misplaced(segments, problem)
        samples = [
            Sample(
                ids=[token for segment in segments for token in segment],
                loss_mask=[index % 2 for index, segment in enumerate(segments) for _ in segment],
                origin=Origin.EXPERT,
                problem_id=problem.id,
            )
            for segments in sequences
        ]
        for sample, chain in zip(samples, chains, strict=False):
            if chain.inserted:
                shorter = self.encoder.encode(chain.texts[0].removesuffix(chain.inserted))
                sample.prefix = sample.loss_mask.index(1) - len(shorter)
        return samples, chains

    def _chains(self, prompt: tuple[Message, ...], example: Example) -> list[_Chain]:
        """The rendered texts of the trained turns, those together that agree on what stands before them."""
        problem = example.problem
        messages, first = _joined(prompt, example)
        self._check_typed(messages, problem.where)
        chains: list[_Chain] = []
        for index in range(first, len(messages)):
            message = messages[index]
            if message["role"] != "assistant" or is_context(message):
                continue
            if says_nothing(message):
                raise DataError("the completion is empty", where=problem.where)
            said = message["content"]
            if index == first:
                opened = self._prompt_text(prompt, problem)
                said = said if index == len(prompt) else example.completion
            else:  # a turn of its own, also where the turn before it is the assistant's
                opened = self.template.prompt(messages[:index], problem.where, tools=problem.tools)
            closed, inserted = self._reply(messages[: index + 1], said, opened, problem)
            begun = opened + inserted
            if chains and begun.startswith(chains[-1].texts[-1]):
                chains[-1].texts += [begun, closed]
            else:
                chains.append(_Chain([begun, closed], inserted))
        if messages[-1]["role"] != "assistant" or not chains:
            reason = "does not end with an assistant message" if chains else "has no assistant message with loss"
            raise DataError(f"the completion {reason}", where=problem.where)
        for key in self.template.unshown(messages, chains[-1].texts[-1]):
            self._notice(f"the chat template does not show what the key {key!r} of messages says")
        return chains

    def _reply(self, messages: Sequence[Message], said: str, opened: str, problem: Problem) -> tuple[str, str]:
        """The text up to the end of the last message, a reply, and what the template has put in front of it.

        Args:
            messages: up to the reply.
            said: the content of the reply, or what of it follows the prompt.
            opened: the prompt.
            problem: that it replies to.

        Raises:
            DataError: the template drops a part of the reply that only it could write.
        """
        template, message, where = self.template, messages[-1], problem.where
        reasoning = next((message[key] for key in REASONING if message.get(key)), None)
        thinks = reasoning is not None or _END_OF_THOUGHT.search(said) is not None
        if thinks and template.denies_thought(opened):
            raise DataError(
                "the prompt ends in an empty thought, and the reply has one of its own",
                where=where,
                hint="let the template have the model think (model.template_kwargs: {enable_thinking: true}), or leave "
                "the reasoning out",
            )
        whole = template.without_rest(template.render(messages, where, tools=problem.tools), where)
        follows = whole.startswith(opened)
        lost = template.lost(message, said, whole[len(opened) if follows else 0 :])
        inserted = template.inserted(messages, said, opened, whole) if follows else ""
        # With a thought in its text that the template takes for an answer, the reply is not what the template says.
        if follows and lost is None and not (inserted and thinks):
            if inserted:
                self._notice_inserted(inserted)
            return whole, inserted
        written = self._as_written(message, reasoning, said, opened)
        if written is None:
            raise self._unwritten(len(messages) - 1, lost, thinks, opened, whole, where)
        self._notice(
            "the chat template drops a part of a reply, or begins it otherwise than its generation prompt: the reply "
            "is put behind the prompt as it is written"
        )
        end = "" if template.turn_end is None else template.turn_end.token
        return opened + template.protected(written) + end, ""

    def _as_written(self, message: Message, reasoning: str | None, said: str, opened: str) -> str | None:
        """What the model would have written behind this prompt; None where only the template could say it."""
        if message.get("tool_calls"):
            return None
        tag = self.template.opens_thought(opened)
        if reasoning is not None:
            return f"{reasoning.strip()}\n</{tag}>\n\n{said.lstrip()}" if tag else None
        if not tag:
            return said
        if f"</{tag}>" not in said:
            return None
        return said.lstrip().removeprefix(f"<{tag}>").lstrip("\n")

    def _unwritten(self, index: int, lost: str | None, thinks: bool, opened: str, whole: str, where: str) -> DataError:
        """Why a reply cannot be put behind its prompt."""
        template = self.template
        other = "take another template (`model.chat_template`)"
        if lost is not None:
            text = lost.strip("`") in REASONING
            way = ", or write the reasoning into the content, with <think> and </think> around it" if text else ""
            return DataError(f"the chat template drops {lost} of message {index}", where=where, hint=other + way)
        tag = template.opens_thought(opened)
        if tag and not thinks:
            off = (
                "set model.template_kwargs: {enable_thinking: false}, or " if template.reads("enable_thinking") else ""
            )
            return DataError(
                f"the prompt ends in an open <{tag}>, and the reply has no thought that would close it",
                where=where,
                hint=f"{off}give the thought (`reasoning_content`, or text up to </{tag}>), or {other}",
            )
        return self._not_a_prefix(opened, whole, where)

    def _notice_inserted(self, inserted: str) -> None:
        way = (
            "; model.template_kwargs: {enable_thinking: false} puts it into the prompt everywhere"
            if self.template.reads("enable_thinking")
            else ""
        )
        self._notice(
            f"the chat template puts {inserted!r} before a reply without reasoning: it is not trained on, and rollouts "
            f"and evaluation do not begin with it{way}"
        )

    def _chat_segments(self, chain: _Chain, where: str) -> list[list[int]]:
        """Ids in turn masked and trained: prompt, assistant turn, what stands between, assistant turn, ..."""
        segments, end = self._chat_ids(chain.texts, where), self.template.turn_end
        for segment in segments[1::2]:
            if end is not None and segment[-1] not in self.template.ends:
                raise DataError(f"an assistant turn does not end with {end.token!r}", where=where)
        if end is None:
            segments[-1].append(self.tokenizer.eos_token_id)
            self._notice(
                "the chat template ends turns without a token: only the last reply of a row is trained to end, with "
                f"{self.tokenizer.eos_token!r} behind what the template writes"
            )
        return segments

    def _chat_ids(self, texts: Sequence[str], where: str) -> list[list[int]]:
        """Ids of the pieces between growing texts, each of which begins with the one before.

        The longest text is tokenized as a whole. If a boundary does not fall between two of its tokens, the pieces are
        tokenized apart, as sampling would see them.
        """
        whole, bounds = self.encoder.encode(texts[-1]), [0]
        for text in texts[:-1]:
            length = self.encoder.start_length(text, texts[-1], whole)
            if length is None:
                pieces = [new[len(old) :] for old, new in zip(texts, texts[1:], strict=False)]
                segments = [self.encoder.encode(texts[0]), *(self.encoder.behind(piece, where) for piece in pieces)]
                break
            bounds.append(length)
        else:
            segments = [whole[start:end] for start, end in zip(bounds, [*bounds[1:], len(whole)], strict=True)]
        self._checked_prompt(segments[0], where)
        return segments

    def _not_a_prefix(self, shorter: str, longer: str, where: str) -> DataError:
        left, right = self.encoder.encode(shorter), self.encoder.encode(longer)
        at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
        shown = [self.shown(ids[max(at - 4, 0) : at + 6]) for ids in (left, right)]
        return DataError(
            f"the chat template renders the start of the conversation differently once a reply follows: at token {at}, "
            f"{shown[0]!r} becomes {shown[1]!r}",
            where=where,
            hint="train on the last turn only, or use a template that leaves earlier turns as they are "
            "(`model.chat_template`), or plain text with `chat: false`",
        )


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
        said = completion.lstrip() if example.problem.repeated else completion
        completion = ({"role": "assistant", "content": said},)
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
