"""The prompt in which a model is shown its earlier answer and asked for a better one, and how a recipe gives it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

PLACEHOLDER = re.compile(r"\{(prompt|answer)\}")


def _both_placeholders(template: str) -> str:
    missing = {"{prompt}", "{answer}"} - {match.group() for match in PLACEHOLDER.finditer(template)}
    if missing:
        raise ValueError(f"the template has no {' and no '.join(sorted(missing))}")
    return template


RevisionTemplate = Annotated[str, AfterValidator(_both_placeholders)]
"""A text with `{prompt}` and `{answer}`; other braces stand for themselves."""


def check_revisions(revisions: int, template: str | None) -> None:
    """Refuse revisions without a template, and a template without them.

    Raises:
        ValueError: revisions without a template, or a template that nothing uses.
    """
    if revisions and template is None:
        raise ValueError("`revisions` needs `revision_template`: the one that the model was trained with")
    if template is not None and not revisions:
        raise ValueError("`revision_template` has no effect without `revisions`")


def filled(template: str, prompt: str, answer: str) -> str:
    """The template with prompt and answer in their places."""
    values = {"prompt": prompt, "answer": answer}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)
