"""A sign of life: while a folder is worked in, one small file there says what is in hand.

`gradpruner serve` reads it instead of asking for the lock, which could refuse a run that starts just then. A
thread writes it, so nothing waits for it; what it cannot write is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gradpruner.common.files import staging
from gradpruner.common.json_files import check_json
from gradpruner.common.progress import Progress, current_progress

PULSE = "progress.json"
_SECONDS, _SECONDS_IDLE = 1.0, 5.0
_MOST_POINTS = 200


class Pulse:
    """Writes the file for as long as the block lasts.

    Args:
        folder: An existing folder that this process holds.
        like: A file of it whose permissions it gets.
    """

    def __init__(self, folder: Path, like: str) -> None:
        self.path, self._like = folder / PULSE, folder / like
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="gradpruner-pulse", daemon=True)
        self.begin("")

    def begin(self, stage: str) -> None:
        """Says what is begun now."""
        self._stage, self._began = stage, time.time()

    def __enter__(self) -> Pulse:
        with suppress(RuntimeError):  # no further thread is allowed
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5)  # a disk that hangs does not hold a run
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Once a second where something has changed; else as often as shows that the process lives."""
        said: dict[str, Any] = {}
        written = -_SECONDS_IDLE
        while True:
            found = self._state()
            if found != said or time.monotonic() - written >= _SECONDS_IDLE:
                with suppress(Exception):  # a full disk, say; the run's own writing says so
                    self._write(found)
                said, written = found, time.monotonic()
            if self._over.wait(_SECONDS):
                return

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"stage": self._stage, "began": self._began}
        progress = current_progress()
        return found if progress is None else found | _said(progress)

    def _write(self, found: dict[str, Any]) -> None:
        check_json(found)
        with staging(self.path) as staged:
            staged.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
            with suppress(OSError):
                shutil.copymode(self._like, staged)
            os.replace(staged, self.path)  # not forced to disk: after a power cut nobody works here


def _said(progress: Progress) -> dict[str, Any]:
    """How far a step is; read beside the thread that does it, so every value is taken once."""
    losses = [(entry["step"], entry["loss"]) for entry in progress.history[:] if "loss" in entry]
    every = -(-len(losses) // _MOST_POINTS) or 1
    return {
        "doing": progress.description,
        "step": progress.completed,
        "steps": progress.total,
        "left": progress.seconds_left(),
        "loss": progress.fields.get("loss"),
        "tokens_per_second": progress.rate() if progress.rate else None,
        "losses": losses[::-1][::every][::-1],
    }
