"""What reaches the terminal. Texts of data, models, reports and servers are foreign: they may hold sequences that write
the clipboard, set the title, move the cursor or hide what stands there.

All that posttrain prints goes through `say` or `console`, which show such characters in place of obeying them. `guard`
does the same, less strictly, for what others print: tracebacks, logs and progress bars of libraries.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# All of C0 but tab and line feed, DEL and C1 (which some terminals read as ESC with a letter), lone surrogates; then
# what shows nothing: marks that turn the direction of text around, separators, fillers of no width, tags, selectors of
# variants (one in front of which another stands selects nothing, and many spell a text). Joiners, which scripts and
# emoji need, stay.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<=[\ufe00-\ufe0f])[\ufe00-\ufe0f]"
)

_COLOUR = re.compile(r"\x1b\[(?!(?:[0-9;]*;)?0*8[;m])[0-9;]*m")
"""How libraries mark text, but for concealed text."""

_HARMLESS = re.compile(rf"\r|{_COLOUR.pattern}|\x1b\[(?:[0-9]*[A-DGJK]|\?25[hl])")
"""How their progress bars do, and move on the line or some lines up."""


def visible(text: str) -> str:
    """`text` with each character that a terminal would obey, or not show, as its escape in JSON: `\\u001b` for ESC.

    Line feeds and tabs stay. JSON stays JSON of the same meaning.
    """
    return _HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def say(text: object = "", *, err: bool = False, nl: bool = True, **style: Any) -> None:
    """Print a text, made visible.

    Args:
        text: what to print.
        err: on standard error.
        nl: end the line.
        style: as `typer.style` takes it: `fg` (the name of a colour), `bold`, `dim`.
    """
    import typer  # not wanted by workers, which only put their streams under guard

    typer.secho(visible(str(text)), err=err, nl=nl, **style)


def console(**options: Any) -> Console:
    """A rich console that shows foreign texts as `say` does and reads no markup in them."""
    from rich.console import Console
    from rich.segment import Segment

    class Visible(Console):
        def render(self, *arguments: Any, **named: Any) -> Iterable[Segment]:
            for part in super().render(*arguments, **named):
                yield part if part.control else Segment(visible(part.text), part.style)

    return Visible(**{"markup": False, "highlight": False} | options)


def _visible_but(kept: re.Pattern[str], text: str) -> str:
    done, parts = 0, []
    for found in kept.finditer(text):
        parts += [visible(text[done : found.start()]), found[0]]
        done = found.end()
    return "".join(parts) + visible(text[done:])


class ShownRecord(logging.LogRecord):
    """A record of a log, which may colour text and no more: logs quote foreign names, and have no progress bars."""

    def getMessage(self) -> str:
        """The message with its arguments, made visible."""
        return _visible_but(_COLOUR, super().getMessage())


class Guarded:
    """A text stream that passes only harmless sequences on, and makes all others visible."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text; the number of its characters."""
        self._stream.write(_visible_but(_HARMLESS, text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard() -> None:
    """Put both streams of this process and all its logs under guard."""
    logging.setLogRecordFactory(ShownRecord)
    if not isinstance(sys.stdout, Guarded):
        sys.stdout, sys.stderr = Guarded(sys.stdout), Guarded(sys.stderr)
