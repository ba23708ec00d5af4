"""Where commands print: results on standard output, errors and interruptions on standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from gradpruner.common.errors import GradPrunerError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Standard output; wide enough for the tables where nothing says how wide it is."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def stop(number: int, frame: object) -> NoReturn:
    """Ctrl-C and SIGTERM unwind like any error, so that the stage is marked and files are closed."""
    from gradpruner.common.world import peer_failure

    word = peer_failure()  # a launcher ends all processes when one has failed: what that one said counts
    if os.environ.get("RANK", "0") == "0":  # of several processes one says it
        if word is not None:
            complain(word)
        else:
            print("Interrupted. Start the same command again to go on.", file=sys.stderr)
    raise SystemExit(word.exit_code if word is not None else 128 + number)


def complain(error: GradPrunerError) -> None:
    """An error and what to do about it, on standard error."""
    from rich.console import Console

    def printable(text: str) -> str:  # bytes of a path that are no UTF-8 must not cost the user the message
        return text.encode("utf-8", "backslashreplace").decode("utf-8")

    out = Console(stderr=True)
    out.print("[bold red]error:[/bold red]", end=" ")
    out.print(printable(error.message), markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        out.print(
            printable(error.hint.lstrip("\n")), markup=False, highlight=False, soft_wrap=True, style="dim"
        )
