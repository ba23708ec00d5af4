"""`gradpruner serve`: shows the runs of a folder in a browser."""

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
        typer.Option(min=0, max=65535, help="Port to listen on, for this machine only; 0 picks a free one."),
    ] = 8765,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
) -> None:
    """Show runs in a browser, live and side by side.

    Only reads the folder, and answers this machine only. Stop it with Ctrl-C.
    """
    import webbrowser

    from gradpruner.reports.serving import open_server

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    with open_server(folder, port) as server:
        typer.echo(f"{server.url} shows {folder} (press Ctrl-C to stop)")
        if not no_open and _has_screen():
            # In its own thread, because opening some browsers blocks until they are closed.
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve_forever()


def _end(number: int, frame: object) -> NoReturn:
    """Exits silently: unlike other commands, there is nothing to resume."""
    raise SystemExit(128 + number)


def _has_screen() -> bool:
    """Returns whether a browser would open in a window; a text browser would take over the terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
