"""Pictures as token ids: what stands in a sequence where a text has the mark of a picture.

The processor of a model writes a picture as a piece of text in which one token is repeated, as often as the picture
takes places. Here each of these places gets an id of its own, far beyond any vocabulary: bits of the picture's hash,
and the number of the place. So a sequence of ids says everything about its pictures, and what compares, shares,
hashes, batches or keeps sequences needs to know nothing about them; `models.eyes` puts the pictures back in front of
the model. SGLang names the places of pictures by their hash for the same reason (its prefix cache).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import ChatTemplate
from posttrain.data.encoding import MARKED, Encoder
from posttrain.data.pictures import ALBUM, OPEN, Picture, known, mark, marks_of
from posttrain.data.sample import Message, Problem
from posttrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FIRST, BESIDE = 1 << 62, 1 << 61
"""Ids from the first number on are places of pictures; those with the second bit of pictures that stand beside others,
which some families look at otherwise than at one that stands alone."""

PLACES, BITS = 1 << 16, 45
"""Places that a picture can take, and bits of its hash that its ids have."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture as the model takes it.

    Attributes:
        picture: itself.
        beside: whether it stands beside others, where that matters.
        text: what the processor writes for it.
        places: how often the token of pictures stands in that.
        pixels: that the model's tower looks at, over all tiles.
    """

    picture: Picture
    beside: bool
    text: str
    places: int
    pixels: int

    @property
    def first(self) -> int:
        """Id of its first place; the others follow."""
        return FIRST | BESIDE * self.beside | _bits(self.picture.digest) << 16

    @property
    def ids(self) -> list[int]:
        """Ids of all its places."""
        return list(range(self.first, self.first + self.places))


def _bits(digest: str) -> int:
    return int(digest, 16) >> 128 - BITS


class PictureText:
    """Writes pictures as a processor does. It stands on the tokenizer, as `pictures`.

    Args:
        processor: of the model, for pictures (`models.processor`).
        token_id: of the places of pictures, by the model's config.
    """

    def __init__(self, processor: Any, token_id: int) -> None:
        self.processor, self.token_id = processor, token_id
        self.placeholder: str = processor.image_token
        self.token = str(processor.tokenizer.convert_ids_to_tokens(token_id))
        self.company_matters = "batch_num_images" in processor.image_processor.model_input_names
        self._seen: dict[tuple[str, bool], Seen] = {}
        self._by_id: dict[int, Seen] = {}

    def seen_in(self, text: str) -> list[Seen]:
        """The pictures of a text, in its order, as the model takes them.

        Raises:
            DataError: the processor refuses one, or it takes too many places.
        """
        digests = list(marks_of([text]))
        return [self._look(digest, self.company_matters and len(digests) > 1) for digest in digests]

    def _look(self, digest: str, beside: bool) -> Seen:
        if (digest, beside) not in self._seen:
            picture = known(digest, "")
            output = self._processed(picture, beside, return_text_replacement_offsets=True)
            text = str(output["text_replacement_offsets"][0][0]["replacement"])
            seen = Seen(picture, beside, text, text.count(self.token), self._pixels(output) // (1 + beside))
            if not 0 < seen.places < PLACES:
                raise DataError(f"the picture would take {seen.places:,} tokens", where=picture.where)
            other = self._by_id.setdefault(seen.first, seen)
            if other.picture.digest != digest:  # once in some 2**45 pairs
                raise DataError(
                    f"the picture cannot be told from that of {other.picture.where}",
                    where=picture.where,
                    hint="leave one of them out",
                )
            self._seen[digest, beside] = seen
        return self._seen[digest, beside]

    @property
    def all_seen(self) -> Collection[Seen]:
        """The pictures that were written so far."""
        return self._seen.values()

    def of_id(self, token: int) -> Seen:
        """The picture that an id is a place of."""
        first = token & ~(PLACES - 1)
        if first not in self._by_id:  # written with another tokenizer: that of a model which is loaded again, say
            digest = next(each for each in ALBUM if _bits(each) == first >> 16 & (1 << BITS) - 1)
            self._look(digest, bool(first & BESIDE))
        return self._by_id[first]

    def seen_among(self, ids: Sequence[int]) -> list[Seen]:
        """The different pictures of a sequence, in its order."""
        return list({id(seen): seen for seen in (self.of_id(token) for token in ids if token >= FIRST)}.values())

    def pixels(self, rows: Iterable[Sequence[int]]) -> int:
        """Pixels that the tower looks at for rows of a pass: of each picture once."""
        every = {seen.first: seen.pixels for row in rows for seen in self.seen_among(row)}
        return sum(every.values())

    def _pixels(self, output: Any) -> int:
        if "image_grid_thw" in output:
            patches = sum(int(frames * height * width) for frames, height, width in output["image_grid_thw"])
            return patches * self.processor.image_processor.patch_size**2
        values = output["pixel_values"]
        return values.size // values.shape[-3]

    def shortened(self, ids: Sequence[int], most: int) -> list[int]:
        """The beginning of a sequence with so many tokens of text at most, and no part of a picture."""
        written = [place for place, token in enumerate(ids) if token < FIRST]
        end = len(ids) if len(written) <= most else written[most]
        return list(ids[:end])

    def arrays(self, seen: Seen) -> dict[str, np.ndarray]:
        """What the model is given of a picture, by name."""
        output = self._processed(seen.picture, seen.beside)
        found = {name: value for name, value in output.items() if hasattr(value, "shape")}
        return {name: value[:1] if seen.beside else value for name, value in found.items()}

    def _processed(self, picture: Picture, beside: bool, **asked: Any) -> Any:
        """What the processor makes of a picture, alone or beside itself."""
        image, times = picture.load(), 1 + beside
        try:
            return self.processor(
                text=[self.placeholder * times], images=[[image] * times], return_tensors="np", **asked
            )
        # One that is far too narrow, say, or settings that are none.
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(
                f"the model's processor refuses the picture ({image.width} x {image.height}): {error}",
                where=picture.where,
            ) from error

    def as_seen(self, seen: Seen) -> Image:
        """The picture as the model sees it, with the tiles of one that it sees in parts beside each other."""
        import numpy as np
        from PIL import Image as pillow

        output = self._processed(seen.picture, seen.beside, do_normalize=False, do_rescale=False)
        values = np.asarray(output["pixel_values"])
        if "image_grid_thw" in output:  # patches of several frames, those that become one token next to each other
            how = self.processor.image_processor
            _, height, width = (int(n) for n in output["image_grid_thw"][0])
            side, merge = how.patch_size, how.merge_size
            patches = values[: height * width].reshape(
                height // merge, width // merge, merge, merge, 3, how.temporal_patch_size, side, side
            )[:, :, :, :, :, 0]
            whole = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, 3)
        else:
            tiles = values.reshape(-1, *values.shape[-3:])
            tiles = tiles[: len(tiles) // 2] if seen.beside else tiles
            whole = np.concatenate(list(tiles.transpose(0, 2, 3, 1)), axis=1)
        return pillow.fromarray(whole.round().clip(0, 255).astype(np.uint8))

    def settings(self) -> str:
        """What decides how a picture is seen, beside the picture."""
        return str(self.processor.to_json_string()) + str(self.processor.image_processor.to_json_string())

    def encoder(self, tokenizer: Any) -> PicturedEncoder:
        """What encodes texts with pictures."""
        return PicturedEncoder(tokenizer, self)

    def template(self, text: str, encoder: PicturedEncoder, stops: Sequence[int]) -> PicturedTemplate:
        """What renders messages with pictures."""
        return PicturedTemplate(text, encoder, stops)

    def refuse_misplaced(self, segments: Sequence[Sequence[int]], problem: Problem) -> None:
        """Refuse pictures in a sequence where they cannot be.

        Args:
            segments: in turn read and written by the model.

        Raises:
            DataError: the model would have to write a picture; or pictures stand in several turns, and the model looks
                otherwise at one that stands beside others, so that no one sequence is what it would have read.
        """
        trained = segments[1::2]
        if any(token >= FIRST for segment in trained for token in segment):
            raise DataError(
                "a reply holds a picture, which a model of text and pictures cannot write",
                where=problem.where,
                hint="put it into a message of the user",
            )
        several = [token for segment in segments[2::2] for token in segment if token >= FIRST]
        if self.company_matters and several:
            raise DataError(
                "pictures in several turns cannot be trained on with this model, which looks otherwise at a picture "
                "beside others than at one alone",
                where=problem.where,
                hint="put all pictures into the first message of the user",
            )


class PicturedEncoder(Encoder):
    """Text with marks to ids with places of pictures, and back."""

    def __init__(self, tokenizer: Any, pictures: PictureText) -> None:
        super().__init__(tokenizer)
        self.pictures = pictures

    def encode(self, text: str) -> list[int]:
        if OPEN not in text:
            ids = super().encode(text)
            if self.pictures.token_id in ids:
                raise DataError(
                    f"the text holds {self.pictures.token!r}, which stands for pictures alone, and no picture",
                    hint="take it out of the text, or leave the row out",
                )
            return ids
        seen = self.pictures.seen_in(text)
        written = iter(seen)
        ids = super().encode(MARKED.sub(lambda _: next(written).text, text))
        token, places = self.pictures.token_id, [token for each in seen for token in each.ids]
        if ids.count(token) != len(places):
            raise DataError(
                f"{len(places)} places of pictures became {ids.count(token)} tokens",
                hint=f"the text around them may hold {self.pictures.token!r}, which stands for pictures alone",
            )
        following = iter(places)
        return [next(following) if each == token else each for each in ids]

    def _decode(self, ids: Sequence[int], special: bool) -> str:
        """A picture is the mark of itself, or what is to be seen of it."""
        found: list[str] = []
        rest: list[int] = []
        before = None
        for token in ids:
            if token < FIRST:
                rest.append(token)
                continue
            seen = self.pictures.of_id(token)
            if before is None or seen is not before or token == seen.first:
                found += [super()._decode(rest, special) if rest else "", shown(seen)]
                rest = []
            before = seen
        return "".join(found) + (super()._decode(rest, special) if rest else "")


def shown(seen: Seen) -> str:
    """A picture, for people."""
    width, height = seen.picture.size
    return f"[picture {seen.picture.digest[:8]}, {width} x {height}, {seen.places} tokens]"


class PicturedTemplate(ChatTemplate):
    """A chat template, with marks of pictures where it writes the placeholder of one."""

    def __init__(self, text: str, encoder: PicturedEncoder, stops: Sequence[int]) -> None:
        self.pictures = encoder.pictures
        super().__init__(text, encoder, stops)
        self._typed = tuple(self._special)  # whatever pictures are built of

    def render(self, messages: Sequence[Message], where: str, **how: Any) -> str:
        text = super().render(messages, where, **how)
        digests = list(marks_of([message["content"] for message in messages]))
        if not digests:
            return text
        pieces = text.split(self.pictures.placeholder)
        if len(pieces) != len(digests) + 1:
            raise DataError(
                f"the chat template shows {len(pieces) - 1} of {len(digests)} pictures",
                where=where,
                hint="`model.chat_template` takes another template",
            )
        marks = [mark(known(digest, where)) for digest in digests]
        return pieces[0] + "".join(m + piece for m, piece in zip(marks, pieces[1:], strict=True))

    def _message(self, message: Message) -> Message:
        found = super()._message(message)
        if OPEN not in message["content"]:
            return found
        content = found["content"] if isinstance(found["content"], str) else found["content"][0]["text"]
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(MARKED.split(content)):
            if number % 2:
                parts.append({"type": "image"})
            elif piece:
                parts.append({"type": "text", "text": piece})
        return {**found, "content": parts}
