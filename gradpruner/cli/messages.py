"""Printing: results go to standard output, errors and interruptions to standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from gradpruner.common.errors import GradPrunerError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Returns a console on standard output, 110 columns wide unless a terminal sets its own width."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def stop(number: int, frame: object) -> NoReturn:
    """Handles Ctrl-C and SIGTERM like any error, so that the stage is marked and files are closed."""
    from gradpruner.common.world import peer_failure

    # When one process fails, the launcher terminates the others: report the failure, not the signal.
    cause = peer_failure()
    if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
        if cause is not None:
            complain(cause)
        else:
            print("Interrupted. Run the same command again to resume.", file=sys.stderr)
    raise SystemExit(cause.exit_code if cause is not None else 128 + number)


def complain(error: GradPrunerError) -> None:
    """Prints an error and its hint to standard error."""
    from rich.console import Console

    def printable(text: str) -> str:  # a path that is not UTF-8 must not break the message
        return text.encode("utf-8", "backslashreplace").decode("utf-8")

    out = Console(stderr=True)
    out.print("[bold red]error:[/bold red]", end=" ")
    out.print(printable(error.message), markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        out.print(
            printable(error.hint.lstrip("\n")), markup=False, highlight=False, soft_wrap=True, style="dim"
        )
