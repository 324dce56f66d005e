"""`posttrain report`: runs, evaluations and comparisons as one HTML file, or served while they go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain.safe_files import write_text_atomic
from posttrain.terminal import say


def report_command(paths: Sequence[Path], output: Path) -> None:
    """Write the report of what the paths hold.

    Args:
        paths: folders of runs and pipelines, and files of `posttrain eval` and `posttrain compare`.
        output: the HTML file.

    Raises:
        DataError: as `collect`.
    """
    from posttrain.report.collect import collect
    from posttrain.report.findings import findings
    from posttrain.report.page import page

    collected = collect(paths)
    write_text_atomic(output, page(collected))
    for finding in findings(collected):
        say(f"{finding.about}: {finding.found}")
    say(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")


def serve_command(paths: Sequence[Path], host: str, port: int) -> None:
    """Serve the report until Ctrl-C.

    Args:
        paths: as for `report_command`.
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        DataError: as `collect`.
        RecipeError: the address cannot be listened on.
    """
    from posttrain.report.serve import LOOPBACK, ReportServer

    with ReportServer(paths, host, port) as server:
        say(f"report: {server.address}")
        if host != LOOPBACK:
            say("who has this address can read all texts of these runs, and traffic is not encrypted")
        say("Ctrl-C ends it")
        server.serve_forever()
