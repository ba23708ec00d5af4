"""A journal of measurements: one JSON line each, written when it is done; the last line of a part counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED, TOO_LARGE = "measured", "does not fit"
SKIPPED, FAILED, OUT_OF_TIME = "skipped", "failed", "out of time"


class Journal:
    """The measurements on one device.

    Args:
        path: The file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> dict[str, dict[str, Any]]:
        """Returns the last line of every part; lines that a kill cut short are skipped."""
        found = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                found[entry["part"]] = entry
        return found

    def outcome(self, part: str) -> str:
        """Returns the outcome of a part so far; "" if it was never started."""
        return str(self.lines().get(part, {}).get("outcome", ""))

    def add(self, part: str, outcome: str, **facts: Any) -> None:
        """Appends a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.exists() else b""
        with self.path.open("a", encoding="utf-8") as file:
            if before and not before.endswith(b"\n"):  # a kill cut the last line short
                file.write("\n")
            file.write(json.dumps({"part": part, "outcome": outcome, **facts}, allow_nan=False) + "\n")
