"""serve: the runs of a folder in a browser."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer


def serve(
    folder: Annotated[Path, typer.Argument(help="A run directory, or a folder of them.")],
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Where it listens, on this machine only; 0 takes a free one."),
    ] = 8765,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
) -> None:
    """Show runs in a browser, while they go and side by side.

    Reads only, answers to this machine only. Ctrl-C ends it.
    """
    import webbrowser

    from gradpruner.reports.serving import open_server

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    with open_server(folder, port) as server:
        typer.echo(f"{server.url} shows {folder} until Ctrl-C.")
        if not no_open and _has_screen():
            # In a thread of its own: some browsers come back only when they are closed.
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve_forever()


def _end(number: int, frame: object) -> NoReturn:
    """There is nothing to go on with, so nothing is said."""
    raise SystemExit(128 + number)


def _has_screen() -> bool:
    """Whether a browser gets a window; a text browser would take the terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
