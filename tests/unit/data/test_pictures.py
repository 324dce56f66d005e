"""Pictures of rows: where they come from, what is refused, where they stand in texts."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from posttrain.config.schema import FileSource
from posttrain.data import fetched, pictures
from posttrain.data.bad_rows import BadRows
from posttrain.data.encoding import MARKED, unmarked
from posttrain.data.pictures import CLOSE, OPEN, Places, mark, take_in
from posttrain.data.sample import Problem, Row
from posttrain.data.sources import examples, preferences, problems
from posttrain.errors import DataError


def png(width: int = 3, height: int = 2, colour: tuple[int, int, int] = (9, 8, 7)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    for number in range(3):
        (tmp_path / "pics" / f"{number}.png").write_bytes(png(colour=(number, 0, 0)))
    return tmp_path


def marks(folder: Path) -> list[str]:
    return [mark(take_in(f"pics/{number}.png", folder, "")) for number in range(3)]


def write(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# ------------------------------------------------------------------------------------------------------- one picture


def test_a_picture_is_the_same_wherever_it_comes_from(folder: Path) -> None:
    data = png(colour=(0, 0, 0))
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    ways = ["pics/0.png", Path("pics/0.png"), data, bytearray(data), address, {"bytes": data, "path": "elsewhere"}]
    ways += [{"path": "pics/0.png"}, {"url": address}, {"type": "image_url", "image_url": {"url": address}}]
    found = {take_in(raw, folder, "here").digest for raw in ways}
    assert len(found) == 1
    assert take_in(data, None, "").size == (3, 2)


class Shelf(ThreadingHTTPServer):
    """A server of pictures; `.url` of its beginning, `.asked` what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                shelf.asked.append(self.path)
                kind = self.path.strip("/")
                moved = {
                    "moved": f"http://{shelf.host}/a.png",
                    "away": "http://elsewhere.invalid/a.png",
                    "round": "/round",
                }
                self.send_response(302 if kind in moved else 404 if kind == "none" else 200)
                if kind in moved:
                    self.send_header("Location", moved[kind])
                self.end_headers()
                try:
                    for _ in range(10_000 if kind in ("large", "slow") else 1):
                        self.wfile.write(b"\0" * 2**16 if kind in ("large", "slow") else png(colour=(5, 6, 7)))
                        time.sleep(0.01 if kind == "slow" else 0)
                except OSError:
                    pass  # the other side has read enough

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with Shelf() as made:
        Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def test_pictures_are_fetched_from_hosts_that_the_source_names(shelf: Shelf, folder: Path) -> None:
    address = f"{shelf.url}/a.png"
    path = write(
        folder, *[{"prompt": "what?", "images": [address], "answer": "a"}] * 2, {"prompt": "x", "images": None}
    )
    source = FileSource(path=path, images="images", image_hosts=[shelf.host])
    found = problems(source, "rows")
    assert mark(take_in(png(colour=(5, 6, 7)), None, "")) in str(found[0].prompt)
    assert shelf.asked == ["/a.png"]  # once for both rows
    assert take_in(f"{shelf.url}/moved", None, "", [shelf.host]).size == (3, 2)
    with pytest.raises(DataError, match="name its host in `image_hosts`"):
        problems(FileSource(path=path, images="images"), "rows")


@pytest.mark.parametrize(
    "kind, said",
    [
        ("none", "could not be fetched: .*404"),
        ("away", "not fetched from 'http://elsewhere"),
        ("round", "leads to more than 3 others"),
        ("large", "more than 32 MiB"),
        ("slow", "did not come within"),
    ],
)
def test_what_a_host_may_not_do(kind: str, said: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "slow":
        monkeypatch.setattr(fetched, "SECONDS", 0.2)
    with pytest.raises(DataError, match=said):
        take_in(f"{shelf.url}/{kind}", None, "rows.jsonl:1", [shelf.host])
    with pytest.raises(DataError, match="not fetched from"):
        take_in("http://127.0.0.1:1/a.png", None, "rows.jsonl:1", [shelf.host])


def test_an_image_of_pillow_keeps_its_pixels() -> None:
    image = Image.new("RGB", (5, 4), (1, 2, 3))
    found = take_in(image, None, "").load()
    assert found.size == (5, 4) and found.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    """As viewers show it: beneath the clear part of a drawing there mostly is the colour of its lines."""
    drawn = Image.new("RGBA", (4, 2))
    drawn.paste((0, 0, 0, 255), (0, 0, 2, 2))
    image = drawn if mode == "RGBA" else drawn.convert("LA") if mode == "LA" else drawn.quantize(4)
    held = io.BytesIO()
    image.save(held, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = take_in(held.getvalue(), None, "").load()
    assert [seen.getpixel((x, 0)) for x in (0, 3)] == [(0, 0, 0), (255, 255, 255)]


def test_of_sixteen_bits_the_upper_ones_are_seen() -> None:
    held = io.BytesIO()
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)).save(held, "PNG")
    seen = take_in(held.getvalue(), None, "").load()
    assert [seen.getpixel((x, 0)) for x in range(5)] == [(value,) * 3 for value in (0, 0, 1, 128, 255)]


def test_pictures_are_turned_upright() -> None:
    image, held = Image.new("RGB", (4, 2)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(held, "JPEG", exif=exif)
    assert take_in(held.getvalue(), None, "").size == (2, 4)


@pytest.mark.parametrize(
    "raw, said",
    [
        ("https://example.org/a.png", "not fetched from the network"),
        ("file:///etc/passwd", "not fetched from the network"),
        ("../outside.png", "leads out of the folder"),
        ("/etc/hostname", "leads out of the folder"),
        ("pics/link.png", "leads out of the folder"),
        ("pics/none.png", "cannot be read: No such file"),
        ("pics", "cannot be read: Is a directory"),
        ("a\0b.png", "no path of a picture"),
        ("\ud800.png", "no path of a picture"),
        ("pics/circle.png", "no path of a picture|cannot be read"),
        ("pics/pipe.png", "no plain file"),
        ("data:image/png;base64,%%%", "no base64"),
        ("data:text/plain,hello", "is base64"),
        (b"no picture", "no picture that can be read"),
        (b"", "no picture that can be read"),
        ({}, "the picture is empty"),
        ({"bytes": None}, "the picture is empty"),
        (7, "must be a path, bytes or an image, not int"),
    ],
)
def test_what_is_no_picture_is_refused(folder: Path, raw: Any, said: str) -> None:
    (folder.parent / "outside.png").write_bytes(png())
    (folder / "pics" / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "pics" / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "pics" / "pipe.png")
    with pytest.raises(DataError, match=said):
        take_in(raw, folder, "rows.jsonl:1")


def test_damaged_pictures_are_refused() -> None:
    held = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(held, "PNG")
    whole = held.getvalue()
    for data in (*(whole[:cut] for cut in range(9, len(whole) // 2, 97)), whole[:50] + b"####" + whole[54:]):
        with pytest.raises(DataError, match="damaged|no picture"):
            take_in(data, None, "")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A picture of a few hundred bytes that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 10_000, 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(8192, 8192), (2**16, 2**16), (2**31 - 1, 2**31 - 1), (40_000_000, 1)])
def test_a_picture_that_would_fill_the_memory_is_refused_unread(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_upright", lambda image: pytest.fail("its pixels were read"))
    with pytest.raises(DataError, match="pixels|damaged"):
        take_in(bomb(width, height), None, "")


def test_a_file_that_is_too_large_is_refused_unread(folder: Path) -> None:
    with (folder / "pics" / "holes.png").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(DataError, match="larger than 32 MiB"):
        take_in("pics/holes.png", folder, "")


def test_a_picture_that_has_changed_is_noticed(folder: Path) -> None:
    (folder / "pics" / "moving.png").write_bytes(png(7, 7))
    picture = take_in("pics/moving.png", folder, "")
    (folder / "pics" / "moving.png").write_bytes(png(7, 8))
    with pytest.raises(DataError, match="changed since the rows were read"):
        picture.load()


# ---------------------------------------------------------------------------------------------------------- rows


def placed(folder: Path, values: dict[str, Any], **source: Any) -> dict[str, Any]:
    return Places(FileSource(path="x.jsonl", images="images", **source), folder)(Row(values, "x.jsonl:1")).values


def test_without_a_place_they_stand_before_the_first_text_of_the_user(folder: Path) -> None:
    first, second, _ = marks(folder)
    paths = ["pics/0.png", "pics/1.png"]
    assert placed(folder, {"prompt": "ask", "images": paths}) == {"prompt": first + second + "ask"}
    assert placed(folder, {"prompt": "ask", "images": "pics/0.png"})["prompt"] == first + "ask"
    assert placed(folder, {"prompt": "ask", "images": json.dumps(paths)})["prompt"] == first + second + "ask"
    assert placed(folder, {"prompt": "ask", "images": None})["prompt"] == "ask"
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "ask"}]
    found = placed(folder, {"messages": talk, "images": paths})["messages"]
    assert found == [talk[0], {"role": "user", "content": first + second + "ask"}]
    shared = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]
    assert placed(folder, {"conversations": shared, "images": paths[:1]})["conversations"][0]["value"] == first + "ask"


def test_pairs_without_a_prompt_of_their_own_have_them_in_both(folder: Path) -> None:
    first, *_ = marks(folder)
    values = {
        role: [{"role": "user", "content": "ask"}, {"role": "assistant", "content": role}]
        for role in ("chosen", "rejected")
    }
    file = write(folder, values | {"images": ["pics/0.png"]})
    (pair,) = preferences(FileSource(path=file, images="images"), "pairs")
    assert pair.problem.prompt == ({"role": "user", "content": first + "ask"},)


def test_places_are_filled_in_their_order(folder: Path) -> None:
    first, second, third = marks(folder)
    paths = ["pics/0.png", "pics/1.png", "pics/2.png"]
    talk = [
        {"role": "user", "content": "<image> and <image>?"},
        {"role": "assistant", "content": "both"},
        {"role": "user", "content": [{"type": "text", "text": "or"}, {"type": "image"}]},
    ]
    found = placed(folder, {"messages": talk, "images": paths})["messages"]
    assert found[0]["content"] == f"{first} and {second}?"
    assert found[2]["content"] == [{"type": "text", "text": "or"}, {"type": "text", "text": third}]


def test_parts_may_hold_their_own(folder: Path) -> None:
    first, *_ = marks(folder)
    part = {"type": "image_url", "image_url": {"url": "pics/0.png"}}
    talk = [{"role": "user", "content": [part, {"type": "text", "text": "ask"}]}]
    found = placed(folder, {"messages": talk})["messages"][0]["content"]
    assert [each["text"] for each in found] == [first, "ask"]


@pytest.mark.parametrize(
    "values, said",
    [
        ({"prompt": "<image><image>", "images": ["pics/0.png"]}, "more places for pictures than the 1"),
        ({"prompt": "<image>", "images": ["pics/0.png", "pics/1.png"]}, "2 pictures, and 1 places"),
        ({"other": "ask", "images": ["pics/0.png"]}, "no text of the user"),
        ({"prompt": "ask", "images": ["pics/0.png"] * 65}, "at most 64 pictures"),
        ({"prompt": f"ask {OPEN}00{CLOSE}", "images": ["pics/0.png"]}, "mark pictures here"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "more places for pictures than the 0"),
    ],
)
def test_rows_whose_pictures_have_no_place_are_refused(folder: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        placed(folder, values)


@pytest.mark.parametrize("read", [problems, examples, preferences])
def test_a_column_that_no_row_has_is_refused(folder: Path, read: Any) -> None:
    """It would train on texts alone, and measure problems that look alike without their pictures."""
    row = {"prompt": "what? ", "completion": "one", "images": ["red.png"]}
    if read is preferences:
        row = {"prompt": "what? ", "chosen": "one", "rejected": "two", "images": ["red.png"]}
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    keep = {"reference": "completion"} if read is problems else {}
    with pytest.raises(DataError, match="no column 'image'.*\n.*images"):
        read(FileSource(path=str(file), images="image", **keep), "rows")
    file.write_text(json.dumps(row | {"images": None}) + "\n")
    assert len(read(FileSource(path=str(file), images="images", **keep), "rows")) == 1


def test_a_bad_picture_is_a_bad_row_with_its_place(folder: Path) -> None:
    (folder / "pics" / "bad.png").write_bytes(b"no picture")
    good, bad = ({"prompt": "ask", "completion": "a", "images": [f"pics/{name}.png"]} for name in ("0", "bad"))
    source = FileSource(path=write(folder, good, bad, good), images="images")
    rows = BadRows("drop")
    assert len(examples(source, "rows", bad=rows)) == 2
    summary = rows.ledger("rows").summary()
    assert "1 bad, first at" in summary and "rows.jsonl:2, column 'images', picture 0" in summary
    with pytest.raises(DataError, match="no picture that can be read"):
        examples(source, "rows")


def test_bytes_in_parquet_are_pictures(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "ask", "answer": "1", "images": [{"bytes": png(), "path": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    (problem,) = problems(FileSource(path=str(folder / "rows.parquet"), images="images", reference="answer"), "rows")
    assert MARKED.match(str(problem.prompt)) and unmarked(str(problem.prompt)) == "ask"
    assert "images" not in problem.meta


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_function_gets_the_prompt_without_its_pictures(folder: Path, chat: bool, tmp_path: Path) -> None:
    """It may be anybody's, and a hash says nothing to it."""
    from posttrain.verifiers.python import PythonVerifier
    from posttrain.verifiers.verdict import Answer

    first, *_ = marks(folder)
    (tmp_path / "reward.py").write_text(
        "def reward(prompt, completion, **more):\n    return float('\\ufdd1' not in str(prompt))\n"
    )
    asked: Any = ({"role": "user", "content": f"{first}ask"},) if chat else f"{first}ask"
    config = PythonVerifier.Config.model_validate(
        {"type": "python", "function": "reward.py:reward"}, context={"folder": tmp_path}
    )
    verifier = PythonVerifier(config)
    verifier.prepare()
    (verdict,) = verifier.judge(Problem("p", asked), [Answer("an answer")], None)
    assert verdict.score == 1.0
