"""The progress file: while a process works in a folder, a small file there says what it is doing.

`gradpruner serve` reads this file. It does not try the lock, because a run that starts just then would be
refused. A thread writes the file, so the run never waits; write errors are ignored.
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
    """Writes the progress file while the `with` block runs, and deletes it at the end.

    Args:
        folder: An existing folder that this process has locked.
        like: A file in it, whose permissions the progress file gets.
    """

    def __init__(self, folder: Path, like: str) -> None:
        self.path, self._like = folder / PULSE, folder / like
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="gradpruner-pulse", daemon=True)
        self.begin("")

    def begin(self, stage: str) -> None:
        """Sets the stage that begins now."""
        self._stage, self._began = stage, time.time()

    def __enter__(self) -> Pulse:
        with suppress(RuntimeError):  # the system allows no more threads
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5)  # a disk that hangs must not keep the run from ending
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Writes once a second if something has changed; else every few seconds, as a sign of life."""
        last: dict[str, Any] = {}
        written = -_SECONDS_IDLE
        while True:
            found = self._state()
            if found != last or time.monotonic() - written >= _SECONDS_IDLE:
                with suppress(Exception):  # a full disk, say; the run itself reports it
                    self._write(found)
                last, written = found, time.monotonic()
            if self._over.wait(_SECONDS):
                return

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"stage": self._stage, "began": self._began}
        progress = current_progress()
        return found if progress is None else found | _facts(progress)

    def _write(self, found: dict[str, Any]) -> None:
        check_json(found)
        with staging(self.path) as staged:
            staged.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
            with suppress(OSError):
                shutil.copymode(self._like, staged)
            os.replace(staged, self.path)  # not synced to disk: after a power cut, no process works here


def _facts(progress: Progress) -> dict[str, Any]:
    """How far the work is; another thread changes the values, so each is read once."""
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
