"""Fills the documents with figures from the committed JSON.

    python docs/render.py            rewrite README.md and docs/*.md
    python docs/render.py --check    fail if any of them is out of date

A block stands between `<!-- figures: NAME -->` and `<!-- end -->`; NAME is a function in BLOCKS. Nothing
between the two is written by hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def real_tasks() -> str:
    spec = importlib.util.spec_from_file_location("real_tasks", ROOT / "benchmarks" / "real_tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cells = module.load_cells()
    seeds = sorted({cell["recipe"]["seed"] for cell in cells})
    return f"{module.markdown(cells)}\n\nMean over seeds {seeds} (lowest to highest)."


def learning_rates() -> str:
    sweep = read(RESULTS / "learning_rates.json")
    lines = ["| mode | learning rate | exact match |", "|---|---|---|"]
    for row in sweep["rows"]:
        mark = " (chosen)" if sweep["best"][row["mode"]] == row["learning_rate"] else ""
        lines.append(f"| {row['mode']} | {row['learning_rate']:g}{mark} | {row['exact_match']:.3f} |")
    return "\n".join(lines) + f"\n\n{sweep['what'].capitalize()}."


BLOCKS: dict[str, Callable[[], str]] = {
    "real_tasks": real_tasks,
    "learning_rates": learning_rates,
}


def render(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}"

    return BLOCK.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "LOG.md"]:
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if stale and args.check:
        print(f"Out of date: {', '.join(stale)}. Run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
