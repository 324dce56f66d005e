"""`posttrain contract`: whether a method keeps what every method must keep, a verdict a line."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from posttrain.config.loading import parse_config
from posttrain.config.locations import Locations
from posttrain.config.own_code import in_short, load
from posttrain.config.plugins import load_plugins
from posttrain.config.relative_paths import holds_a_model
from posttrain.errors import RecipeError, nearest
from posttrain.methods import METHODS
from posttrain.terminal import say


def contract_command(written: str, overrides: Sequence[str], *, ranks: bool, losses_only: bool) -> bool:
    """Check and print.

    Args:
        written: a plugin's file or module, all of whose methods are checked, or the name of a method.
        overrides: parameters of the method, `key=value`.
        ranks: also train on two ranks.
        losses_only: train no model.

    Returns:
        Whether every check passed.

    Raises:
        PosttrainError: there is no such method or file, or a parameter is wrong or missing.
    """
    kept = [_one(name, overrides, ranks, losses_only) for name in _named(written)]
    return all(kept)


def _named(written: str) -> list[str]:
    if written in METHODS:
        return [written]
    if not written.endswith(".py") and "/" not in written and "." not in written:
        raise RecipeError(f"no method {written!r}", hint=nearest(written, METHODS) + "; a file ends in .py")
    (place,) = load_plugins([written], where="posttrain contract")
    module = load(place).__name__
    found = [name for name, cls in METHODS.items() if f"{cls.__module__}.".startswith(f"{module}.")]
    if not found:
        raise RecipeError("it registers no method", where=place, hint="put `@posttrain.methods.register` on the class")
    return found


def _one(name: str, overrides: Sequence[str], ranks: bool, losses_only: bool) -> bool:
    from transformers import logging

    from posttrain.contract import loss, shell
    from posttrain.contract.recipes import write_model

    logging.set_verbosity_error()  # what it says of random weights is no news
    cls = METHODS[name]
    models = {field: "a-model" for field, info in cls.Config.model_fields.items() if holds_a_model(info)}
    needed = {field: path for field, path in models.items() if cls.Config.model_fields[field].is_required()}
    config = parse_config({"name": name, **needed}, cls.Config, overrides, Locations(f"method {name}"))
    section = {**config.model_dump(exclude_unset=True), "name": name}
    method = cls(config)
    say(f"{name}: {', '.join(f'{k}={v}' for k, v in section.items() if k != 'name') or 'defaults'}", bold=True)
    verdicts = [_verdict(check, partial(check, method)) for check in loss.CHECKS]
    if not losses_only:
        with tempfile.TemporaryDirectory(prefix="posttrain-contract-") as temporary:
            folder = Path(temporary)
            case = shell.Case(section, folder / "runs", write_model(folder / "model"))
            checks = [*shell.CHECKS, *([shell.two_ranks_train_the_same_model] if ranks else [])]
            verdicts += [_verdict(check, partial(_quietly, check, case)) for check in checks]
    asked = [verdict for verdict in verdicts if verdict is not None]
    broken = asked.count(False)
    say(f"{broken} of {len(asked)} checks failed" if broken else f"{len(asked)} checks passed")
    return not broken


def _verdict(check: Callable[..., Any], run: Callable[[], str | None]) -> bool | None:
    """Run a check and print its line; None where it does not apply."""
    what = inspect.getdoc(check) or check.__name__
    what = what.split("\n\n")[0].replace("\n", " ").rstrip(".")
    try:
        reason = run()
    # Whatever a method raises here is a mistake in it, to be shown as such; ours say where they stand as well.
    except Exception as error:
        say("FAIL  ", fg="red", bold=True, nl=False)
        say(f"{what}\n      {_said(error)}")
        return False
    say("ok    " if reason is None else "-     ", fg="green" if reason is None else None, nl=False)
    say(what if reason is None else f"{what} (does not apply: {reason})")
    return True if reason is None else None


def _said(error: Exception) -> str:
    from posttrain.contract.loss import Broken

    return str(error) if isinstance(error, Broken) else in_short(error)


def _quietly(check: Callable[..., None], case: Any) -> None:
    """Without what a run prints."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        check(case)
