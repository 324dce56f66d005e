"""Text to token ids and back where tokenizers differ: a space put in front, and control tokens typed into a text.

Some tokenizers (SentencePiece and its relatives) put a space in front of every text they are given, and take one away
in front of every text they decode. A text that follows other text must then be encoded and decoded as one that
follows something: `def add(` and `a, b):` are to become `def add(a, b):`.

What somebody typed is text. Where it spells a token by which the chat template builds the conversation, such as the end
of a turn, `protected` breaks the word by a mark that no text holds, and `encode` takes the mark out again and writes
the word in the letters of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Label = TypeVar("Label")

MARK = "\ufdd0"
"""A code point that Unicode keeps free of meaning, so that no text holds it."""

PICTURE = "\ufdd1"
"""Another one, with which the mark of a picture begins (`data.pictures`)."""

MARKED = re.compile(f"{PICTURE}([0-9a-f]{{32}})\ufdd2")
"""The mark of a picture in a text."""

_ANCHORS = ("\n", ")", "x", "1", "=")
"""Texts to stand before one that follows something; the first that no token joins to it is taken."""

_NEAR = 80
"""Characters before a boundary among which the last special token is looked for."""

_FEW = 256
"""Ends of starts that are remembered: what templates write before a reply is mostly the same."""

_SPACES = ("\u2581", "\u0120")
"""How vocabularies write a space in front of a word."""


def unmarked(text: str) -> str:
    """A text without the marks of its pictures."""
    return MARKED.sub("", text) if PICTURE in text else text


def readable(text: str) -> str:
    """A text for people, with the beginning of its hash for a picture."""
    return MARKED.sub(lambda found: f"[picture {found[1][:8]}]", text) if PICTURE in text else text


class Encoder:
    """Encodes and decodes with one tokenizer, without the tokens that it would add around a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._short = lru_cache(_FEW)(self.encode)

    @cached_property
    def puts_space(self) -> bool:
        """Whether the tokenizer puts a space in front of a text."""
        tokens = self.tokenizer.convert_ids_to_tokens(self._encode("b"))
        return bool(tokens) and str(tokens[0]).startswith(_SPACES)

    @cached_property
    def byte_level(self) -> bool:
        """Whether each token stands for a byte of the text or more: BPE over bytes, and nothing that rewrites the text
        before."""
        if not self._plain:
            return False
        backend = self.tokenizer.backend_tokenizer
        over_bytes = "ByteLevel" in str(backend.pre_tokenizer) and type(backend.model).__name__ == "BPE"
        return over_bytes and backend.normalizer is None

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands; words broken by `protected` become plain text.

        Raises:
            DataError: the text holds a picture, and this tokenizer brings nothing that reads them.
        """
        if PICTURE in text:
            raise DataError(
                "the row holds a picture, and the model is loaded as one of text",
                hint="add `model.pictures: {}`, or leave `images` out of the source",
            )
        return self._encode(text) if MARK not in text else self._encode_protected(text)

    def behind(self, text: str, where: str = "") -> list[int]:
        """Ids of a text that follows other text, whose ids stay as they are.

        Raises:
            DataError: the tokenizer joins the beginning of the text to whatever stands before it.
        """
        if not self.puts_space or not text:
            return self.encode(text)
        for anchor in _ANCHORS:
            before, both = self._encode(anchor), self.encode(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        raise DataError(f"the tokenizer cannot write {text[:20]!r} behind other text without a space", where=where)

    def start_length(self, start: str, text: str, ids: Sequence[int]) -> int | None:
        """How many of the ids of a text are those of its start; None where the start by itself has other ids.

        Tokenizers take special tokens out of a text first, and what stands between two of them is read by itself. So
        of the start only what follows its last special token has to be encoded once more.

        Args:
            start: what the text begins with.
            ids: of `text`, from `encode`.
        """
        known = self._before_last_special(start, text, ids)
        if known is None:
            found = self.encode(start)
            return len(found) if list(ids[: len(found)]) == found else None
        length, rest = known
        found = self._short(rest)
        return length + len(found) if list(ids[length : length + len(found)]) == found else None

    def _before_last_special(self, start: str, text: str, ids: Sequence[int]) -> tuple[int, str] | None:
        """Number of ids before the last special token near the end of a start, and the text from that token on."""
        if MARK in text or not self.tokenizer.is_fast or not self._special:
            return None
        near = list(self._specials.finditer(start, max(len(start) - _NEAR, 0)))
        if not near or self._special[near[-1][0]].single_word:
            return None
        last, word = near[-1], near[-1][0]
        token = self.tokenizer.convert_tokens_to_ids(word)
        if text.count(word) != ids.count(token):  # a longer word holds it, say
            return None
        at = -1
        for _ in range(start.count(word)):
            at = ids.index(token, at + 1)
        return at, start[last.start() :]

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids that follow others, its first space included.

        Args:
            special: show special tokens.
        """
        if not self.puts_space:
            return self._decode(ids, special)
        anchor = self._encode("x")
        return self._decode([*anchor, *ids], special).removeprefix(self._decode(anchor, special))

    def pieces(self, ids: Sequence[int], labels: Sequence[Label]) -> list[tuple[str, Label]]:
        """The text of a sequence, special tokens shown, cut where the label changes, with the label of each piece.

        The pieces are the text of the whole, not texts decoded apart: what a tokenizer does where two of them meet
        can be seen.
        """
        found, shown, end = [], "", 0
        for label, run in groupby(labels):
            start, end = end, end + len(list(run))
            whole = self._decode(ids[:end], True)
            # A boundary within a character, of which bytes are tokens, has no text of its own.
            piece = whole[len(shown) :] if whole.startswith(shown) else self._decode(ids[start:end], True)
            shown = whole
            found.append((piece, label))
        return found

    def protected(self, text: str, words: Iterable[str]) -> str:
        """The text with each of these words broken by a mark."""
        for word in words:
            if word in text:
                text = text.replace(word, word[0] + MARK + word[1:])
        return text

    def _encode(self, text: str) -> list[int]:
        if self._plain:
            backend = self.tokenizer.backend_tokenizer
            as_told = backend.encode_special_tokens == self.tokenizer.split_special_tokens
            if as_told and backend.truncation is None and backend.padding is None:
                return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    @cached_property
    def _plain(self) -> bool:
        """Whether the ids are what the Rust tokenizer says, its class adding nothing: asked itself, without the places
        of the tokens, it takes a third to two thirds of the time."""
        if not self.tokenizer.is_fast:
            return False
        from transformers import PreTrainedTokenizerFast

        kind = type(self.tokenizer)
        own = ("__call__", "_encode_plus", "set_truncation_and_padding")
        return all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in own)

    def _decode(self, ids: Sequence[int], special: bool) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _encode_protected(self, text: str) -> list[int]:
        """Special tokens of the text itself stay tokens; between them, what is broken is read as letters."""
        ids: list[int] = []
        special = ""
        for number, piece in enumerate(self._specials.split(text)):
            if number % 2:  # the pattern has one group: every second piece is a special token
                special = piece
                ids.append(self.tokenizer.convert_tokens_to_ids(special))
            elif MARK in piece:
                ids += self._letters(piece.replace(MARK, ""), special)
            elif piece:
                ids += self._encode(special + piece)[1 if special else 0 :]
        return ids

    def _letters(self, text: str, special: str) -> list[int]:
        """Ids of a text behind this special token, in which nothing is a special token."""
        if special and self._special[special].rstrip:
            text = text.lstrip()
        anchor = ""
        if special and self.puts_space:
            first = str(self.tokenizer.convert_ids_to_tokens(self._encode(special + "b")[1]))
            anchor = "" if first.startswith(_SPACES) else "\n"
        ids = self.tokenizer(
            anchor + text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        return list(ids)[len(self._encode(anchor)) if anchor else 0 :]

    @cached_property
    def _special(self) -> dict[str, Any]:
        return {token.content: token for token in self.tokenizer.added_tokens_decoder.values() if token.special}

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
