"""Turns in token ids: prompt, action, boundary, action, boundary, ... What was sampled is never encoded again.

The ids of an action are those that were sampled. Behind it stands what the chat template writes between a reply and
the next generation prompt: the end of the turn, unless that was sampled, the observation as a message, and the header
of the next reply. It is found by rendering the conversation with a word in place of the action and taking what follows
that word. The whole conversation is rendered, because some templates write a message otherwise by its place.

So appending always works. Whether the template, given the conversation as text, would show the same is another matter:
many leave the reasoning of earlier turns out, or trim replies. A probe finds that before anything is sampled. Trained
on what it has seen, the policy would then be served something else, so such a template is refused, unless the recipe
says to keep the turns as they are (`environment.template_drift`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from posttrain.config.environment import EnvironmentConfig
from posttrain.data.encoding import MARK, PICTURE
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Message, Problem
from posttrain.environments.base import Step
from posttrain.environments.tools import Tools
from posttrain.errors import DataError, ModelError

_WORD = "posttrain takes the place of an action"
_PROBES = ("a probe answer", "<think>\na probe thought\n</think>\n\na probe answer")
_LEFT_OUT = "\n[... {} tokens left out ...]\n"


@dataclass(slots=True)
class Conversation:
    """An episode so far, as text and as ids.

    Attributes:
        problem: with the first observation in its prompt.
        messages: up to the next action.
        ids: the same, with the generation prompt at the end; behind the first turn they are no rendering of `messages`,
            but what was sampled with what stands between.
    """

    problem: Problem
    messages: list[Message]
    ids: list[int] = field(default_factory=list)


class Turns:
    """Renders the turns of episodes.

    Args:
        renderer: with a chat template.
        config: how long observations may be, and what to do about drift.

    Attributes:
        drift: how the template shows a turn otherwise, in words; None if it does not.
        shortened: observations that were.

    Raises:
        ModelError: no chat template, one that ends turns without a token, or one with drift that is not to be kept.
    """

    def __init__(self, renderer: Renderer, config: EnvironmentConfig) -> None:
        if renderer.template is None:
            raise ModelError(
                "an environment talks with the policy in turns, and the tokenizer has no chat template",
                where="model.chat_template",
                hint="give one (recipes/agents/sft-rooms.yaml has a short one)",
            )
        if renderer.template.turn_end is None:
            raise ModelError(
                "the chat template ends turns of the assistant without a token, so several cannot stand in a row",
                where="model.chat_template",
                hint="take a template with an end token behind every reply",
            )
        if renderer.pictures is not None and renderer.pictures.company_matters:
            raise ModelError(
                "an environment may show pictures in several turns, and this model looks otherwise at a picture beside "
                "others than at one alone",
                where="model.path",
                hint="take another family (docs/pictures.md)",
            )
        self.renderer, self.template, self.encoder = renderer, renderer.template, renderer.encoder
        self.end = renderer.template.turn_end
        self.observation_tokens, self.shortened = config.observation_tokens, 0
        if isinstance(config, Tools.Config):
            self._probe_tools(config)
        self.drift = self._probe()
        if self.drift is not None and config.template_drift == "refuse":
            raise ModelError(
                f"the chat template shows earlier turns otherwise than they were sampled: {self.drift}",
                where="model.chat_template",
                hint="take a template that leaves turns as they are, or set environment.template_drift: keep, and "
                "serve the policy with its turns kept too",
            )

    def open(self, problem: Problem, seen: str) -> Conversation:
        """The beginning of an episode.

        Args:
            problem: of the data.
            seen: the environment's first observation, which becomes the last paragraph of the prompt.

        Raises:
            DataError: a prompt that is plain text by the recipe, or that ends inside a reply; or as
                `Renderer.prompt_ids`.
        """
        if problem.chat is False:
            raise DataError(
                "an episode is a chat, and `chat: false` makes plain text of the prompt",
                where=problem.where or problem.id,
                hint="leave `chat` out",
            )
        prompt = problem.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if messages[-1]["role"] == "assistant":
            raise DataError("the prompt of an episode ends inside a reply", where=problem.where or problem.id)
        if seen:
            last = messages[-1]
            said = [last["content"]] if last["content"].strip() else []
            messages[-1] = {**last, "content": "\n\n".join([*said, self.short(seen)])}
        begun = replace(problem, prompt=tuple(messages))
        return Conversation(begun, messages, self.renderer.prompt_ids(begun))

    def go_on(self, conversation: Conversation, action: Sequence[int], step: Step) -> list[int]:
        """Put an action and what came of it behind a conversation; the boundary behind the action.

        Args:
            action: ids as they were sampled.
            step: what came of it.

        Raises:
            DataError: the template refuses the conversation.
            ModelError: it does not show what follows a reply.
        """
        told = [{"role": "tool", "name": name, "content": self.short(text)} for name, text in step.results]
        told = told or [{"role": "user", "content": self.short(step.observation)}]
        behind = self._behind(conversation.messages, told, conversation.problem)
        boundary = self.encoder.encode(self.end.token + behind)
        if boundary[0] != self.end.id:
            raise ModelError("the end token of the chat template is no token by itself", where="model.chat_template")
        if action and action[-1] == self.end.id:
            del boundary[0]
        conversation.ids += [*action, *boundary]
        conversation.messages += [{"role": "assistant", "content": self.renderer.text(action)}, *told]
        return boundary

    def action_ids(self, action: str) -> tuple[int, ...]:
        """An action that somebody has written, with the end of its turn."""
        return (*self.encoder.encode(action), self.end.id)

    def drifts(self, conversation: Conversation) -> bool:
        """Whether the template shows this conversation otherwise than its ids do."""
        shown = self._rendered(conversation.messages, conversation.problem)
        if PICTURE in shown:
            shown = self.encoder.text(self.encoder.encode(shown), special=True)
        return shown.replace(MARK, "") != self.encoder.text(conversation.ids, special=True)

    def short(self, observation: str) -> str:
        """An observation, without its middle if it is longer than allowed."""
        ids = self.encoder.encode(observation)
        if len(ids) <= self.observation_tokens:
            return observation
        if PICTURE in observation:
            raise DataError(
                f"an observation has {len(ids):,} tokens, and one with a picture is not shortened",
                where="environment",
                hint=f"raise environment.observation_tokens from {self.observation_tokens:,}, or show less",
            )
        self.shortened += 1
        note = len(self.encoder.encode(_LEFT_OUT.format(len(ids))))
        half = max((self.observation_tokens - note) // 2, 1)
        head, tail = (self.encoder.text(part, special=True) for part in (ids[:half], ids[-half:]))
        return head + _LEFT_OUT.format(len(ids) - 2 * half) + tail

    def _rendered(self, messages: Sequence[Message], problem: Problem) -> str:
        text = self.template.render(messages, problem.where, tools=problem.tools, generation=True)
        return text if self.template.has_generation_prompt else text + self.template.generation

    def _behind(self, messages: Sequence[Message], told: Sequence[Message], problem: Problem) -> str:
        """What the template writes between the end of a reply and the next one."""
        text = self._rendered([*messages, {"role": "assistant", "content": _WORD}, *told], problem)
        _, found, tail = text.rpartition(_WORD)
        _, ends, behind = tail.partition(self.end.token)
        if not found or not ends:
            raise ModelError("the chat template does not show a reply as it is", where="model.chat_template")
        return behind

    def _probe_tools(self, config: Tools.Config) -> None:
        """Refuse a template that does not show what a tool returned, and a tokenizer that hides calls."""
        ask, told = {"role": "user", "content": "a probe question"}, {"role": "tool", "name": "probe"}
        try:
            behind = self._behind([ask], [{**told, "content": "a probe result"}], Problem("", ""))
        except DataError as error:
            behind, reason = "", f": {error.what}"
        else:
            reason = ""
        if "a probe result" not in behind:
            raise ModelError(
                f"the chat template does not show what a tool returns{reason}",
                where="model.chat_template",
                hint="take a model that was trained to call tools, or another template",
            )
        mark = "<tool_call>"
        if config.calls == "hermes" and self.encoder.text(self.encoder.encode(mark)) != mark:
            raise ModelError(
                f"{mark} is a special token of this tokenizer, which no text of a reply shows",
                where="environment.calls",
                hint="take a model that writes calls as text, or `calls: json`",
            )

    def _probe(self) -> str | None:
        ask, told = ({"role": "user", "content": f"{word} probe question"} for word in ("one", "another"))
        problem = Problem("", "")
        opened = self._rendered([ask], problem)
        behind = self._behind([ask], [told], problem)
        tag = self.template.opens_thought(opened)
        for reply in _PROBES[1:] if tag else _PROBES[:1] if self.template.denies_thought(opened) else _PROBES:
            said = reply.removeprefix("<think>\n") if tag else reply
            kept = opened + said + self.end.token + behind
            shown = self._rendered([ask, {"role": "assistant", "content": said}, told], problem)
            if shown != kept:
                at = next((i for i, (a, b) in enumerate(zip(shown, kept, strict=False)) if a != b), len(shown))
                return f"{kept[max(at - 10, 0) : at + 50]!r} becomes {shown[max(at - 10, 0) : at + 50]!r}"
        return None
