"""`posttrain replay`: the batch of one optimizer step, row by row."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from posttrain.cli.tables import print_table
from posttrain.errors import StateError
from posttrain.safe_files import write_json_atomic
from posttrain.terminal import say
from posttrain.trainers.rebuilt_step import RebuiltRow, RebuiltStep, TokenSequence, rebuild_step


def replay_command(run: Path, step: int, row: str | None, output: Path | None) -> None:
    """Rebuild and print.

    Args:
        run: folder of a run.
        step: optimizer step, from 1.
        row: `<micro-batch>.<row>`, to see all of its text; None for the table of all rows.
        output: JSON file for everything.

    Raises:
        StateError: no such run, step or row.
    """
    found = rebuild_step(run, step)
    names = {f"{one.micro_batch}.{one.row}": one for one in found.rows}
    if row is not None and row not in names:
        raise StateError(f"no row {row!r} in this batch", where=str(run), hint=f"rows: {', '.join(names)}")
    _print_head(found)
    if row is None:
        _print_rows(found.rows)
    else:
        _print_row(names[row])
    if output is not None:
        write_json_atomic(output, asdict(found) | {"checkpoint": str(found.checkpoint) if found.checkpoint else None})
        say(f"\nwrote {output}")


def _print_head(found: RebuiltStep) -> None:
    source = found.checkpoint or "the start of the run"
    say(f"step {found.step}, from {source} and {found.steps_again} steps taken again", bold=True)
    logged = f"{found.logged['loss']:.7g}" if "loss" in found.logged else "nothing for this step"
    say(f"  loss {found.loss:.7g} from the rows below; the run logged {logged}")
    for difference in found.differences:
        say(f"  changed since the checkpoint: {difference}", fg="yellow")


def _print_rows(rows: list[RebuiltRow]) -> None:
    cells = []
    for row in rows:
        loss = "  ".join(f"{value:+.4g}" for value in row.loss.values())
        for number, sequence in enumerate(row.sequences):
            first = number == 0
            cells.append(
                (
                    f"{row.micro_batch}.{row.row}" if first else "",
                    sequence.role,
                    f"{sequence.trained}/{sequence.tokens}",
                    _number(sequence.logp),
                    _number(sequence.ref_logp),
                    _advantage(row) if first else "",
                    loss if first else "",
                    _trained_text(sequence),
                )
            )
    terms = " ".join(rows[0].loss) if rows else ""
    header = ("row", "role", "trained/tokens", "logp", "ref", "advantage", f"loss: {terms}", "trained text")
    print_table(cells, header=header)
    say("\n  logp, ref: mean over trained tokens. loss: what the row adds to the step's. --row M.R shows a row.")


def _print_row(row: RebuiltRow) -> None:
    rows = [("advantage", _advantage(row)), *((f"loss {term}", f"{value:+.7g}") for term, value in row.loss.items())]
    rows += [(name, str(value)) for name, value in row.values.items()]
    print_table(rows)
    for sequence in row.sequences:
        title = f"{sequence.role or 'sequence'}: {sequence.trained} of {sequence.tokens} tokens trained"
        say(f"\n  {title}", bold=True)
        for text, trained in sequence.pieces:
            label = "trained" if trained else "context"
            say(f"  [{label}] ", fg="green" if trained else None, dim=not trained, nl=False)
            say(repr(text))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _advantage(row: RebuiltRow) -> str:
    if isinstance(row.advantage, list):
        return f"{len(row.advantage)} per token"
    return "" if row.advantage is None else f"{row.advantage:+.4g}"


def _trained_text(sequence: TokenSequence) -> str:
    text = repr("".join(text for text, trained in sequence.pieces if trained))[1:-1]
    return text if len(text) <= 48 else f"{text[:45]}..."
