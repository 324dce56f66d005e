"""What a run would have one trust, as `check` and `study --check` print it."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.cli.tables import print_table
from posttrain.config.trust import Trusted
from posttrain.terminal import say


def say_trusted(found: Sequence[Trusted], of: str, *, run_code: bool) -> bool:
    """Print what a run trusts.

    Args:
        found: all of it.
        of: what is run.
        run_code: whether code among it runs here.

    Returns:
        Whether code is among it.
    """
    if found:
        print_table([(each.key, each.what) for each in found], f"trust: a run of this {of}")
    code = any(each.code for each in found)
    if code:
        here = "of it, plugins and the model's code run here (--run-code)" if run_code else "no code of it runs here"
        say(f"  {here}; docs/security.md says more")
    return code
