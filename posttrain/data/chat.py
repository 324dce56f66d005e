"""What a chat template does with a conversation, found by rendering: its prompt, its turns, what it adds and drops.

A template is a program of the model's makers, and nothing here reads its text. What the renderer has to know is found
with probes, once for each template:

- how it ends a turn of the assistant: the end token that stands there in the middle of a conversation as at its end;
- what its generation prompt is; a template without one gets the header that it writes before every reply;
- under which key it takes the reasoning of a message (`reasoning_content`, `thinking` or `reasoning`);
- whether it reads the clock. All renderings of one object see the same time.

What the rows say must be in the rendering. Which of it is not is told by `lost` for a reply and refused by `prompt`
for what stands before; white space does not count, as many templates trim. Control tokens that somebody typed into a
message are text there (`data.encoding`): they end no turn and begin none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from posttrain.data.encoding import Encoder
from posttrain.data.messages import REASONING
from posttrain.data.sample import Message
from posttrain.errors import DataError, ModelError, PosttrainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("role", "content", "weight", "tool_calls", "name", "tool_call_id", "id", *REASONING)
"""Keys of a message that are looked after elsewhere, or that only name something."""

_REPLY = "posttrain renders one probe answer"
_THOUGHT = "posttrain renders one probe thought"
_ASK = {"role": "user", "content": "question"}
_CLOCK = "strftime_now"
_LONG = 16
"""Characters that no template holds by chance."""

_OPEN = re.compile(r"(?:<([A-Za-z_]\w*)>|\[([A-Z_]+)\])\s*$")
_CLOSED = re.compile(r"(?:<([A-Za-z_]\w*)>\s*</\1>|\[([A-Z_]+)\]\s*\[/\2\])\s*$")
_EMPTY = re.compile(r"\s*(?:<([A-Za-z_]\w*)>\s*</\1>|\[([A-Z_]+)\]\s*\[/\2\])\s*")
_CLOSE = re.compile(r"\s*(?:</([A-Za-z_]\w*)>|\[/([A-Z_]+)\])\s*")


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How the template ends the last assistant turn: the end token and the text behind it."""

    id: int
    token: str
    rest: str


class ChatTemplate:
    """One chat template with one tokenizer.

    Args:
        text: the template.
        encoder: of the tokenizer.
        stops: ids of tokens that are known to end a completion.

    Raises:
        ModelError: a template that leaves out what the assistant says.
    """

    def __init__(self, text: str, encoder: Encoder, stops: Sequence[int]) -> None:
        from posttrain.data.template_bounds import bound_templates

        bound_templates()
        self.text, self._encoder, self._stops = text, encoder, set(stops)
        self.tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
        self.clock: dict[str, str] = {}
        self._now = datetime.now()
        # While the template is probed, keys stay as they are and nothing that is typed is protected.
        self.reasoning_key: str | None = None
        self._typed: tuple[str, ...] = ()
        self._frames: dict[str, bool] = {}
        self._parts = False
        probe = self._probe_reply()
        self._head, _, tail = probe.rpartition(_REPLY)
        self.turn_end = self._find_turn_end(tail)
        self.has_generation_prompt, self.generation = self._find_generation()
        self.reasoning_key = self._find_reasoning_key()
        self._typed = self._control_words(probe)

    # ---------------------------------------------------------------------------------------------------- rendering

    def render(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        tools: Sequence[dict[str, Any]] = (),
        generation: bool = False,
        open_end: bool = False,
    ) -> str:
        """The conversation as the template has it.

        Raises:
            DataError: messages that the template refuses.
            ModelError: a template that computes for too long, or writes too much.
        """
        from jinja2 import TemplateError

        from posttrain.data.template_bounds import TooMuch

        try:
            return self.tokenizer.apply_chat_template(
                [self._message(message) for message in messages],
                tools=list(tools) or None,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=generation,
                continue_final_message=open_end,
                **({_CLOCK: self._time} if _CLOCK in self.text else {}),
            )
        except (TooMuch, RecursionError) as error:
            raise ModelError(
                f"the chat template is out of bounds: {error}",
                where="model.chat_template",
                hint="take a template that does no more than to write the messages",
            ) from error
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A template is a program of the model's makers: what Python raises inside it is its own.
            raise DataError(
                f"the chat template refuses these messages: {error}",
                where=where,
                hint="`model.chat_template` takes another template",
            ) from error

    def prompt(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        tools: Sequence[dict[str, Any]] = (),
        prefilled: bool = False,
    ) -> str:
        """The conversation up to where the assistant writes; with `prefilled` that is within its last message.

        Raises:
            DataError: as `render`, or a message or the tools are left out.
        """
        text = self.render(messages, where, tools=tools, generation=not prefilled, open_end=prefilled)
        if not prefilled and not self.has_generation_prompt:
            text += self.generation
        self._refuse_left_out(messages, text, where, tools)
        return text

    def without_rest(self, text: str, where: str) -> str:
        """The text up to the end token of its last turn, inclusive.

        Raises:
            DataError: the turn ends without an end token, where others have one.
        """
        end = self.turn_end
        if end is None:
            return text
        if text.endswith(end.token + end.rest):
            return text.removesuffix(end.rest)
        whole = text.rstrip()
        other = next((token for token in self._special if whole.endswith(token)), None)  # calls of tools may have one
        if other is not None:
            return whole
        raise DataError(
            f"the chat template ends this assistant turn with {text[-40:]!r}, others with {end.token + end.rest!r}",
            where=where,
            hint="`model.chat_template` takes another template",
        )

    # ----------------------------------------------------------------------------------------- what a rendering says

    def lost(self, message: Message, said: str, reply: str) -> str | None:
        """Which part of a reply is missing from its rendering; None if nothing is.

        Args:
            message: the assistant's.
            said: its content, or of a prefilled message what follows the prompt.
            reply: its rendering, from behind the prompt on.
        """
        seen = _squeezed(reply)
        key = next((key for key in REASONING if message.get(key)), None)
        if key is not None and _squeezed(message[key]) not in seen:
            return f"`{key}`"
        # A thought that the generation prompt opens is not opened again.
        if _squeezed(self.protected(said)).removeprefix(f"<{self.opens_thought(self.generation)}>") not in seen:
            return "`content`"
        for value in _leaves([call.get("function", call) for call in message.get("tool_calls") or ()]):
            value = self.protected(value)
            forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
            if not any(_squeezed(form) in seen for form in forms):
                return "`tool_calls`"
        return None

    def unshown(self, messages: Sequence[Message], text: str) -> list[str]:
        """Keys of these messages whose text is not in their rendering, such as a `note`."""
        further = {(key, item) for message in messages for key, item in message.items() if key not in _NAMES}
        if not further:
            return []
        seen = _squeezed(text)
        return sorted({key for key, item in further if _squeezed(self.protected(item)) not in seen})

    def inserted(self, messages: Sequence[Message], said: str, opened: str, whole: str) -> str:
        """What the template writes between prompt and reply, in place of a reasoning that the row does not have say.

        Args:
            messages: up to the reply.
            said: as for `lost`.
            opened: the prompt.
            whole: the messages, which begin with the prompt.
        """
        reply, content = whole[len(opened) :], self.protected(said).strip()
        # Behind the answer of a tool some templates write the header, but give no generation prompt.
        header = self.generation if self.generation.strip() and reply.startswith(self.generation) else ""
        reply = reply.removeprefix(header)
        if any(messages[-1].get(key) for key in REASONING):
            return header
        empty = _EMPTY.match(reply)
        if empty is None and (tag := self.opens_thought(opened)):
            close = _CLOSE.match(reply)
            empty = close if close is not None and tag in close.groups() else None
        if empty is not None:
            return header if content.startswith(empty[0].strip()) else header + empty[0]
        start = reply.find(content[:16]) if content else -1
        frame = reply[: max(start, 0)]
        return header + frame if frame.strip() and self._is_empty_frame(messages, frame, whole) else header

    def opens_thought(self, opened: str) -> str:
        """The tag of reasoning in which a prompt ends, such as `think`; empty if in none."""
        found = _OPEN.search(opened)
        return "" if found is None else found[1] or found[2]

    def reads(self, name: str) -> bool:
        """Whether the template has a setting of this name."""
        return name in self.text

    def denies_thought(self, opened: str) -> bool:
        """Whether a prompt ends in an empty thought, which says that none follows."""
        return _CLOSED.search(opened) is not None

    # ------------------------------------------------------------------------------------------------------- messages

    def typed_words(self, messages: Sequence[Message]) -> list[str]:
        """Control tokens that somebody typed into these messages."""
        texts = [text for message in messages for text in _leaves([{k: v for k, v in message.items() if k != "role"}])]
        return [word for word in self._typed if any(word in text for text in texts)]

    def check_typed(self, messages: Sequence[Message], where: str) -> None:
        """Refuse end tokens in a message that cannot be written as text.

        Raises:
            DataError: names message and token.
        """
        for word in self._unwritable:
            for index, message in enumerate(messages):
                if word in str(message.get("content")):
                    raise DataError(
                        f"message {index} holds {word!r}, which ends a turn and cannot be written as text here",
                        where=where,
                        hint="leave the row out, or make it a special token of the tokenizer",
                    )

    def _message(self, message: Message) -> Message:
        """As the template takes it: typed control tokens broken, the reasoning under the key that it reads."""
        found = {key: item for key, item in message.items() if key != "weight"}
        key = next((key for key in REASONING if found.get(key)), None)
        if key is not None and self.reasoning_key is not None:
            found[self.reasoning_key] = found.pop(key)
        if self._typed:
            found = {key: item if key == "role" else self._broken(item) for key, item in found.items()}
        if self._parts:
            found["content"] = [{"type": "text", "text": found["content"]}]
        return found

    def _broken(self, item: Any) -> Any:
        if isinstance(item, str):
            return self.protected(item)
        if isinstance(item, dict):
            return {key: self._broken(value) for key, value in item.items()}
        return [self._broken(value) for value in item] if isinstance(item, list | tuple) else item

    def protected(self, text: str) -> str:
        """The text with typed control tokens broken, as `data.encoding` has it."""
        return self._encoder.protected(text, self._typed)

    def _refuse_left_out(
        self, messages: Sequence[Message], text: str, where: str, tools: Sequence[dict[str, Any]]
    ) -> None:
        seen = _squeezed(text)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" or not message["content"].strip():
                continue
            content = _squeezed(self.protected(message["content"]))
            if len(content) >= _LONG and content in seen:
                continue
            # A short text may stand there by chance, and a long one in another form, as JSON say. Left out is what
            # makes no difference.
            other = [*messages[:index], {**message, "content": _THOUGHT}, *messages[index + 1 :]]
            if self.render(other, where, tools=tools) == self.render(messages, where, tools=tools):
                raise DataError(
                    f"the chat template leaves out message {index}, of role {message['role']!r}",
                    where=where,
                    hint="leave it out of the row, or take a template that shows it: `model.chat_template`",
                )
        for tool in tools:
            name = tool.get("function", tool).get("name")
            if name is not None and name not in text:
                raise DataError(
                    f"the chat template does not show the tool {name!r}",
                    where=where,
                    hint="take a template that knows tools: `model.chat_template`",
                )

    # --------------------------------------------------------------------------------------------------------- probes

    def _time(self, form: str) -> str:
        self.clock[form] = self._now.strftime(form)
        return self.clock[form]

    def _probe_reply(self) -> str:
        """A question and an answer, the contents as the template takes them: as text, or as parts (vision models)."""
        where, messages = "tokenizer.chat_template", [_ASK, {"role": "assistant", "content": _REPLY}]
        try:
            probe = self.render(messages, where)
        except DataError as error:
            probe, refusal = "", cast(PosttrainError, error)
        else:
            refusal = ModelError("the chat template leaves out what the assistant says", where=where)
        if _REPLY in probe:
            return probe
        self._parts = True
        try:
            probe = self.render(messages, where)
        except DataError:
            probe = ""
        if _REPLY not in probe:
            raise refusal
        return probe

    def _find_turn_end(self, tail: str) -> TurnEnd | None:
        """The end token behind a reply, if there is one.

        Where a conversation goes on, other text may follow than at its very end. The end token is what both have: the
        first token of it that is known to stop, else the last.
        """
        found, position = [], 0
        for token_id in self._encoder.encode(tail):
            token = str(self.tokenizer.convert_ids_to_tokens(token_id))
            # Some vocabularies hold runs of white space as added tokens; they end nothing. Nor does the unknown token.
            if token_id in self.ends and token.strip() and token in tail[position:]:
                position = tail.index(token, position) + len(token)
                found.append((token_id, token, position))
        if not found:
            return None
        try:
            longer = self.render([_ASK, {"role": "assistant", "content": _REPLY}, _ASK], "")
        except DataError:  # some must end with a reply
            longer = ""
        within = len(os.path.commonprefix([tail, longer.rpartition(_REPLY)[2]]))
        shared = [end for end in found if end[2] <= within]
        stopping = [end for end in shared or found if end[0] in self._stops]
        token_id, token, position = (stopping or shared[-1:] or found)[0]
        return TurnEnd(token_id, token, tail[position:])

    def _find_generation(self) -> tuple[bool, str]:
        """Whether there is a generation prompt, and what stands before a reply: it, or else the header."""
        without, prompted = self.render([_ASK], ""), self.render([_ASK], "", generation=True)
        if without != prompted:
            return True, prompted[len(os.path.commonprefix([without, prompted])) :]
        header = self._head.removeprefix(without) if self._head.startswith(without) else ""
        # A space belongs to the word behind it, as tokenizers have it; so what is only that is the model's to write.
        return False, header.rstrip(" ")

    def _find_reasoning_key(self) -> str | None:
        for key in REASONING:
            try:
                text = self.render([_ASK, {"role": "assistant", "content": _REPLY, key: _THOUGHT}], "")
            except DataError:
                continue
            if _THOUGHT in text:
                return key
        return None

    def _is_empty_frame(self, messages: Sequence[Message], frame: str, whole: str) -> bool:
        """Whether a text is what the template writes around a reasoning, without one."""
        if self.reasoning_key is None:
            return False
        if frame not in self._frames:
            text = self.render([*messages[:-1], {**messages[-1], self.reasoning_key: _THOUGHT}], "")
            head, found, tail = text.partition(_THOUGHT)
            self._frames[frame] = bool(found) and _squeezed(head + tail).startswith(_squeezed(whole))
        return self._frames[frame]

    def _control_words(self, probe: str) -> tuple[str, ...]:
        """Special tokens that the template builds conversations of, and those that end them."""
        try:
            probe += self.render([{"role": "system", "content": "system"}, _ASK], "", generation=True)
        except DataError:  # it takes no system message
            probe += self.render([_ASK], "", generation=True)
        stops = {str(self.tokenizer.convert_ids_to_tokens(token)) for token in self._stops}
        return tuple(word for word in self._special if word in probe or word in stops)

    @cached_property
    def _special(self) -> list[str]:
        """Special tokens that can be written as plain text too; the longest first, as one may hold another."""
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted({token.content for token in added if token.special and token.content.strip()}, key=len)[::-1]

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that can end a turn: those that stand for themselves, never for a part of a word."""
        return {int(token) for token in self.tokenizer.added_tokens_decoder} | set(self.tokenizer.all_special_ids)

    @cached_property
    def _unwritable(self) -> list[str]:
        ends = self._stops if self.turn_end is None else self._stops | {self.turn_end.id}
        words = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in sorted(ends)]
        return [word for word in words if word not in self._special]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _leaves(value: Any) -> Iterator[str]:
    """All texts and numbers within a value, as text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
