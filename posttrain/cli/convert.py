"""`posttrain convert`: a configuration of another tool as a recipe, and what could not be carried over."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from posttrain.config.foreign import convert
from posttrain.config.yaml_file import read_file
from posttrain.errors import RecipeError, nearest
from posttrain.methods import METHODS
from posttrain.safe_files import write_text_atomic
from posttrain.terminal import say


def convert_command(file: Path, method: str | None, ranks: int, out: Path | None) -> None:
    """Print the recipe, or write it; say on standard error what to look at.

    Raises:
        RecipeError: the file is no configuration that is known, or `out` is there already.
    """
    if out is not None and out.exists():
        raise RecipeError("is there already", where=str(out), hint="name another file, or remove it")
    if method is not None and method not in METHODS:
        raise RecipeError(f"no method {method!r}", where="--method", hint=nearest(method, METHODS))
    theirs, _ = read_file(file)
    try:
        found = convert(theirs, method, ranks)
    except RecipeError as error:
        raise RecipeError(error.what, where=str(file), hint=error.hint) from error
    text = StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.dump(found.recipe, text)
    if out is None:
        say(text.getvalue(), nl=False)
    else:
        write_text_atomic(out, text.getvalue())
        say(f"wrote {out}: look it through, then `posttrain check {out}`", err=True)
    for key, ours, note in found.told:
        say(f"note: {key} -> {ours}: {note}", err=True)
    for key, value, why in found.left:
        say(f"not carried over: {key}: {value!r}: {why}", fg="yellow", err=True)
