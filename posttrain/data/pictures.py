"""Pictures of rows: found where the rows say, looked at once, and known by what is in them.

A picture is known by the hash of its bytes. In a text it is a mark of that hash between two characters that no text
holds, so that messages stay text and everything that compares, counts or hashes prompts takes pictures in.

What a row may say is in docs/pictures.md. A picture comes from a file beside the data, from the row itself (bytes, a
`data:` address, a `PIL` image), or from the network where the recipe names its host. Nothing that a row says leads out
of the folder of its data file, and nothing is decoded before its size is known to be within bounds.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.bounded_files import read_bytes
from posttrain.data.columns import listed
from posttrain.data.encoding import MARKED, PICTURE
from posttrain.data.sample import Row
from posttrain.errors import DataError
from posttrain.safe_files import file_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

    from posttrain.config.schema import FileSource

OPEN, CLOSE = PICTURE, "\ufdd2"
"""Code points that Unicode keeps free of meaning, so that no text holds them."""

PLACE = "<image>"
"""What many data sets write into a text where a picture of the row's column stands."""

MAX_BYTES = 32 * 2**20
"""Of a picture as it is written."""

MAX_PIXELS = 2**25
"""Of a picture, 8192 x 4096 say: a file of a few bytes can become any number of them."""

MAX_PICTURES = 64
"""Of a row."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""That are read; the first frame of those that move. Pillow knows many more, most of them rarely looked after."""

TYPES = ("image", "image_url", "input_image")
"""Of a part of a message that is a picture."""

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")
"""How an address begins."""

_SOURCES = ("image", "image_url", "bytes", "path", "url", "data")
"""Keys of such a part, or of a picture in a column, that hold it or say where it is."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that rows hold.

    Attributes:
        digest: the first 128 bits of the SHA-256 of its bytes, in hex; of an image in memory of its pixels.
        size: width and height in pixels, turned upright.
        where: the first place that it was found at.
        file: that it is read from again; None where `data` has it.
        data: its bytes, where no file has them.
    """

    digest: str
    size: tuple[int, int]
    where: str
    file: Path | None
    data: bytes | None

    def load(self) -> Image:
        """The picture, upright and in RGB.

        Raises:
            DataError: its file is gone, or another than it was.
        """
        data = self.data
        if data is None:
            data = _file_bytes(self.file, self.where)
            if _digest(data) != self.digest:
                raise DataError("the picture has changed since the rows were read", where=str(self.file))
        return _decoded(data, self.where)


ALBUM: dict[str, Picture] = {}
"""The pictures of this process, by digest. They are what their digests say, so that nobody can overwrite another's."""


FETCHED: dict[str, bytes] = {}
"""What stood at the addresses that rows of this process name: each is asked once."""


def mark(picture: Picture) -> str:
    """The picture as it stands in a text."""
    return f"{OPEN}{picture.digest}{CLOSE}"


def known(digest: str, where: str) -> Picture:
    """The picture of a mark.

    Raises:
        DataError: there is none.
    """
    if digest not in ALBUM:
        raise DataError("the text names a picture that was not read", where=where, hint="name `images` of its source")
    return ALBUM[digest]


# ------------------------------------------------------------------------------------------------------- one picture


def take_in(raw: Any, folder: Path | None, where: str, hosts: Sequence[str] = ()) -> Picture:
    """The picture that a row has, or says where it is; from now on it is in the album.

    Args:
        raw: a path, a `data:` address, bytes, an image of Pillow, or an object with one of these, as data sets have it.
        folder: that paths begin at, and may not lead out of; None where the rows lie in no folder.
        where: the row.
        hosts: that pictures are fetched from.

    Raises:
        DataError: nothing of that kind, too large, or no picture that can be read.
    """
    if isinstance(raw, Mapping):
        given = [raw[key] for key in _SOURCES if raw.get(key) is not None]
        if not given:
            raise DataError("the picture is empty", where=where, hint=f"one of the keys {', '.join(_SOURCES)}")
        return take_in(given[0], folder, where, hosts)
    file: Path | None = None
    digest = ""
    if isinstance(raw, str) and raw.startswith("data:"):
        data = _of_address(raw, where)
    elif hosts and isinstance(raw, str) and ADDRESS.match(raw):
        from posttrain.data.fetched import fetched

        if raw not in FETCHED:
            FETCHED[raw] = fetched(raw, hosts, MAX_BYTES, where)
        data = FETCHED[raw]
    elif isinstance(raw, str | Path):
        file = _local(str(raw), folder, where)
        data = _file_bytes(file, where)
    elif isinstance(raw, bytes | bytearray):
        data = bytes(raw)
    elif hasattr(raw, "save") and hasattr(raw, "mode"):
        data, digest = _of_pillow(raw)
    else:
        raise DataError(f"a picture must be a path, bytes or an image, not {type(raw).__name__}", where=where)
    if len(data) > MAX_BYTES:
        raise DataError(f"the picture has more than {MAX_BYTES // 2**20} MiB", where=where)
    digest = digest or _digest(data)
    if digest not in ALBUM:
        size = _decoded(data, where).size
        ALBUM[digest] = Picture(digest, size, where, file, None if file is not None else data)
    return ALBUM[digest]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _local(path: str, folder: Path | None, where: str) -> Path:
    if ADDRESS.match(path):
        raise DataError(
            f"pictures are not fetched from the network: {path[:80]!r}",
            where=where,
            hint="download it, and give its path relative to the data file; or name its host in `image_hosts`",
        )
    if folder is None:
        raise DataError(f"rows that lie in no folder cannot name files: {path[:80]!r}", where=where)
    file = folder / path
    try:
        within = file.resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError, OSError) as error:  # a null character, half a character, links in a circle
        raise DataError(f"no path of a picture: {path[:80]!r} ({error})", where=where) from error
    if not within:
        raise DataError(
            f"the path of a picture leads out of the folder of its data file: {path[:80]!r}",
            where=where,
            hint=f"put the pictures into {folder}, or a folder in it",
        )
    return file


def _file_bytes(file: Path | None, where: str) -> bytes:
    assert file is not None
    try:
        return read_bytes(file, DataError, MAX_BYTES)
    except OSError as error:
        raise DataError(f"the picture {str(file)!r} cannot be read: {error.strerror}", where=where) from error
    except DataError as error:
        raise DataError(f"the picture {str(file)!r}: {error.what}", where=where) from error


def _of_address(address: str, where: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64") or len(body) > 2 * MAX_BYTES:
        raise DataError("a `data:` address of a picture is base64, of at most 32 MiB", where=where)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the `data:` address is no base64: {error}", where=where) from error


def _of_pillow(image: Any) -> tuple[bytes, str]:
    """Bytes of an image in memory, without loss, and the digest of its pixels: packing is not the same everywhere."""
    upright, held = _upright(image), io.BytesIO()
    upright.save(held, "PNG", compress_level=1)
    return held.getvalue(), _of_pixels(upright)


def _of_pixels(image: Image) -> str:
    return _digest(f"{image.size} ".encode() + image.tobytes())


def _upright(image: Any) -> Image:
    """Turned as its EXIF says, what is transparent on white, and of 16 bits the upper ones: Pillow alone would show
    whatever colour lies beneath, and nearly all of 16 bits as white."""
    from PIL import Image as pillow
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode == "I" or turned.mode.startswith("I;16"):
        turned = turned.point(lambda value: value * (1 / 256)).convert("L")
    if turned.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in turned.info:
        clear = turned.convert("RGBA")
        turned = pillow.alpha_composite(pillow.new("RGBA", clear.size, "white"), clear)
    return turned.convert("RGB")


def _decoded(data: bytes, where: str) -> Image:
    import struct

    from PIL import Image as pillow

    try:
        with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size  # of the head alone; pixels are made by what follows
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"the picture has {width} x {height} pixels, more than {MAX_PIXELS:,}",
                    where=where,
                    hint="scale it down; models see far fewer",
                )
            return _upright(image)
    except pillow.UnidentifiedImageError as error:
        raise DataError("no picture that can be read", where=where, hint=f"these can: {', '.join(FORMATS)}") from error
    except pillow.DecompressionBombError as error:
        raise DataError(f"the picture has far too many pixels ({error})", where=where) from error
    # What decoders of damaged files raise.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the picture is damaged: {first}", where=where) from error


# ------------------------------------------------------------------------------------------------------ rows


def folder_of(path: str) -> Path | None:
    """The folder that paths of pictures begin at, of a source's path; None for one of the Hub."""
    given = Path(path).expanduser()
    return given if given.is_dir() else given.parent if given.exists() else None


class Places:
    """Puts the pictures of rows of one source where they stand in its texts.

    A picture of the column goes where a text says `<image>` or a message has a part of type `image` without a source of
    its own, in their order; where nothing says so, all go in front of the first text of the user.

    Args:
        source: names the column.
        folder: see `take_in`.

    Attributes:
        named: whether a row had the column, if only with nothing in it, or a part with a picture of its own.
    """

    def __init__(self, source: FileSource, folder: Path | None) -> None:
        assert source.images is not None
        self.column, self.folder, self.hosts = source.images, folder, source.image_hosts
        self.named = False
        given = (source.prompt, source.messages, "messages", "conversations", "instruction")
        self.asked = tuple(dict.fromkeys(name for name in given if name is not None))
        answers = (source.completion or "completion", source.chosen or "chosen", source.rejected or "rejected")
        self.answered = (*answers, *(source.others or {}).values())

    def __call__(self, row: Row) -> Row:
        """The row without its column of pictures, and with marks in its texts.

        Raises:
            DataError: a picture that cannot be taken in, or as many pictures as there are no places.
        """
        values = dict(row.values)
        self.named |= self.column in values
        place = f"{row.where}, column {self.column!r}"
        raw = listed(values.pop(self.column, None))
        every = [] if raw is None else list(raw) if isinstance(raw, list | tuple) else [raw]
        if len(every) > MAX_PICTURES:
            raise DataError(f"a row has at most {MAX_PICTURES} pictures, this one {len(every)}", where=place)
        found = [mark(take_in(each, self.folder, f"{place}, picture {i}", self.hosts)) for i, each in enumerate(every)]
        used = most = 0
        for name in (*self.asked, *self.answered):
            if values.get(name) is None:
                continue
            # Each answer goes on where the prompt has stopped.
            row_places = _Walk(found, used, self.folder, f"{row.where}, column {name!r}", self.hosts)
            values[name] = row_places.walk(values[name])
            self.named |= row_places.own
            if name in self.asked:
                used = row_places.used
            most = max(most, row_places.used)
        if most == 0 and found:
            self._in_front(values, "".join(found), row.where)
        elif most < len(found):
            raise DataError(f"{len(found)} pictures, and {most} places for them in the texts", where=place)
        return Row(values, row.where)

    def _in_front(self, values: dict[str, Any], marks: str, where: str) -> None:
        """Before the first text of the user; in rows without a prompt of their own before that of every answer."""
        for name in self.asked:
            if (placed := _before(values.get(name), marks)) is not None:
                values[name] = placed
                return
        whole = {name: placed for name in self.answered if (placed := _before_user(values.get(name), marks))}
        if not whole:
            raise DataError("there is no text of the user that the row's pictures could stand before", where=where)
        values.update(whole)


def _before(said: Any, marks: str) -> Any:
    return marks + said if isinstance(said, str) else _before_user(said, marks)


def _before_user(said: Any, marks: str) -> list[Any] | None:
    """Messages with pictures before what the user says first; None where there is no such message."""
    for number, message in enumerate(said if isinstance(said, list | tuple) else ()):
        if isinstance(message, Mapping) and message.get("role", message.get("from")) in USERS:
            key = "content" if "content" in message else "value"
            old = message.get(key)
            new = marks + old if isinstance(old, str) else [{"type": "text", "text": marks}, *(old or ())]
            return [*said[:number], {**message, key: new}, *said[number + 1 :]]
    return None


USERS = ("user", "human")
"""Names of the role that asks."""


class _Walk:
    """Through the texts of one column, in their order."""

    def __init__(self, marks: Sequence[str], used: int, folder: Path | None, where: str, hosts: Sequence[str]) -> None:
        self.marks, self.used, self.folder, self.where, self.hosts = marks, used, folder, where, hosts
        self.own = False

    def walk(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list | tuple):
            return [self.walk(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        if value.get("type") in TYPES:
            return {"type": "text", "text": self._part(value)}
        return {key: self.walk(item) if key in _TEXTS else item for key, item in value.items()}

    def _text(self, text: str) -> str:
        if OPEN in text or CLOSE in text:
            raise DataError("the text holds U+FDD1 or U+FDD2, which mark pictures here", where=self.where)
        if not self.marks or PLACE not in text:
            return text
        return re.sub(re.escape(PLACE), lambda _: self._next(), text)

    def _part(self, part: Mapping[str, Any]) -> str:
        if any(part.get(key) is not None for key in _SOURCES):
            self.own = True
            return mark(take_in(part, self.folder, self.where, self.hosts))
        return self._next()

    def _next(self) -> str:
        if self.used >= len(self.marks):
            raise DataError(f"more places for pictures than the {len(self.marks)} that the row has", where=self.where)
        self.used += 1
        return self.marks[self.used - 1]


_TEXTS = ("content", "value", "text")
"""Keys of messages and their parts that hold text."""


# ------------------------------------------------------------------------------------------------------ beside a file


def folder_beside(file: Path) -> Path:
    """Where the pictures of a file lie whose rows name them by their marks, or by paths from its folder."""
    return file.with_name(f"{file.name.removesuffix('.gz').rpartition('.')[0]}.pictures")


def put_beside(texts: Sequence[str], folder: Path) -> None:
    """Write the pictures that texts have marks of into a folder, each by its digest; what is there stays."""
    for digest in marks_of(texts):
        file, picture = folder / digest, known(digest, "")
        if not file.exists():
            folder.mkdir(exist_ok=True)
            with file_atomic(file) as beside:
                beside.write_bytes(_file_bytes(picture.file, picture.where) if picture.data is None else picture.data)


def take_back(texts: Sequence[str], folder: Path, where: str) -> None:
    """Take in the pictures that texts have marks of, from the folder that `put_beside` has filled.

    Raises:
        DataError: one is not there, or is another.
    """
    for digest in marks_of(texts):
        if digest in ALBUM:
            continue
        data = _file_bytes(folder / digest, where)
        image = _decoded(data, where)
        if digest not in (_digest(data), _of_pixels(image)):
            raise DataError("the picture is another than the row was made with", where=str(folder / digest))
        ALBUM[digest] = Picture(digest, image.size, where, None, data)


def by_path(rows: Sequence[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Rows for a file whose `prompt` may have marks: with `<image>` there, and the paths of the pictures, which are put
    beside the file, in a column `images`; rows without pictures as they are where none has some.

    Raises:
        DataError: a text holds `<image>` beside its pictures.
    """
    texts = [_texts_of(row["prompt"]) for row in rows]
    if not any(OPEN in text for of_row in texts for text in of_row):
        return list(rows)
    folder, made = folder_beside(file), []
    for row, of_row in zip(rows, texts, strict=True):
        if any(PLACE in text for text in of_row):
            raise DataError(f"the prompt says {PLACE!r} beside its pictures", where=str(row.get("problem_id", "")))
        put_beside(of_row, folder)
        made.append({**row, "prompt": _placed(row["prompt"])})
        made[-1]["images"] = [f"{folder.name}/{digest}" for digest in marks_of(of_row)]
    return made


def _texts_of(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]


def _placed(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return MARKED.sub(PLACE, prompt)
    return [{**message, "content": MARKED.sub(PLACE, message["content"])} for message in prompt]


def marks_of(texts: Sequence[str]) -> Iterator[str]:
    """Digests of the pictures in some texts, in their order."""
    for text in texts:
        for found in MARKED.finditer(text) if OPEN in text else ():
            yield found[1]
