"""Pictures in what an environment says: `shown` of a picture goes where it stands in an observation.

From there to the trainer, through the process of the environment, it is text: its bytes, between the two code points
that mark a picture (`data.pictures`). There it becomes the mark of its hash, as a picture of a row is, before anybody
else reads the observation. Imports without torch.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from posttrain.data.encoding import PICTURE
from posttrain.environments.base import Failure, Fault, Step
from posttrain.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

CLOSE = "\ufdd2"
"""What ends the mark of a picture."""

MOST = 8
"""Pictures of one observation."""

WHOLE = re.compile(f"{PICTURE}[^{CLOSE}]*{CLOSE}")
ADDRESSED = re.compile(f"{PICTURE}(data:[^{CLOSE}]*){CLOSE}")

Answer = TypeVar("Answer", str, Step, Failure)


def shown(picture: bytes | Image) -> str:
    """A picture as it stands in an observation, or in what a tool returns.

    Args:
        picture: the bytes of a file, or an image of Pillow.
    """
    if not isinstance(picture, bytes):
        held = io.BytesIO()
        picture.save(held, "PNG")
        picture = held.getvalue()
    return f"{PICTURE}data:image/png;base64,{base64.b64encode(picture).decode()}{CLOSE}"


def without_pictures(text: str) -> tuple[str, list[str]]:
    """A text without its pictures, and these as they stand in it."""
    return (WHOLE.sub("", text), WHOLE.findall(text)) if PICTURE in text else (text, [])


def taken_in(answer: Answer) -> Answer | Failure:
    """What an environment has answered, with the marks of its pictures; where one cannot be read the episode fails."""
    try:
        if isinstance(answer, str):
            return _marked(answer)
        if isinstance(answer, Step):
            seen = _marked(answer.observation)
            results = tuple((name, _marked(text)) for name, text in answer.results)
            return answer if seen == answer.observation and results == answer.results else _with(answer, seen, results)
    except DataError as error:
        return Failure(Fault.CRASH, f"{error.where}: {error.what}"[:300])
    return answer


def _with(step: Step, seen: str, results: tuple[tuple[str, str], ...]) -> Step:
    return replace(step, observation=seen, results=results)


def _marked(text: str) -> str:
    if PICTURE not in text:
        return text
    from posttrain.data.pictures import mark, take_in

    if len(WHOLE.findall(text)) > MOST:
        raise DataError(f"an observation has more than {MOST} pictures", where="environment")
    return ADDRESSED.sub(lambda found: mark(take_in(found[1], None, "an observation")), text)
