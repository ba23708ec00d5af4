"""Printing: results go to standard output, errors and interruptions to standard error."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from gradpruner.cli.options import spoken
from gradpruner.common.errors import GradPrunerError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Returns a console on standard output, 110 columns wide unless a terminal sets its own width."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def speaking() -> Console:
    """Returns the same console; in lines of text, it names options instead of the recipe keys they set."""
    from rich.console import Console
    from rich.text import Text

    class Speaking(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            for line in objects:
                if isinstance(line, Text):
                    line.plain = spoken(line.plain)
            super().print(*objects, **options)

    return Speaking(width=console().width)


class Spoken(logging.Formatter):
    """Formats log messages for somebody who gave options, not recipe keys."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the message alone, as `spoken` says it."""
        return spoken(super().format(record))


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
        return spoken(text.encode("utf-8", "backslashreplace").decode("utf-8"))

    out = Console(stderr=True)
    out.print("[bold red]error:[/bold red]", end=" ")
    out.print(printable(error.message), markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        out.print(
            printable(error.hint.lstrip("\n")), markup=False, highlight=False, soft_wrap=True, style="dim"
        )
