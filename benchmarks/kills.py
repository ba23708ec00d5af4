"""Kills a run at random moments and starts it again; its figures must be those of a run never killed.

python benchmarks/kills.py --kills 20

The run is that of a tiny model: recording, pruning with repair, fine-tuning with checkpoints, evaluation.
When it ends before its next kill, another one is begun in a new folder. Prints a line per folder; exits 1
where anything differs: rows, plans, scores, every answer, every weight to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from builders import make_project

from gradpruner.common.progress import set_mode
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe import load_recipe

# What tells how long something took, or how it came about; everything else must be equal.
OF_THE_WAY = {"seconds", "peak_memory_bytes", "tokens_per_second", "resumed_from", "measured_from", "resumed"}
COMPARED = ("model", "data", "trace", "scores", "plans", "variants", "rows", "reference")


def start(recipe: Path, out: Path) -> int:
    """Begins, or goes on with, a run in a process of its own; returns its number."""
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        run(load_recipe(recipe, (), {"out": str(out)}))
        os._exit(0)
    except BaseException as error:
        print(f"{out.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def ended(process: int, seconds: float) -> int | None:
    """How a process ended within so many seconds; None if it goes on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def figures(value: Any) -> Any:
    """A record without what tells of times and of the way it came about."""
    if isinstance(value, dict):
        return {key: figures(inner) for key, inner in value.items() if key not in OF_THE_WAY}
    return [figures(inner) for inner in value] if isinstance(value, list) else value


def found_in(out: Path) -> dict[str, Any]:
    """Everything a finished run says and leaves, but for times."""
    record = json.loads((out / "run.json").read_text())
    files = [path for kind in ("*.safetensors", "examples*.jsonl", "plan*.json") for path in out.rglob(kind)]
    left = {str(path.relative_to(out)): path.read_bytes() for path in files}
    return {"figures": figures({key: record[key] for key in COMPARED}), "files": left}


def kill_until(recipe: Path, folder: Path, kills: int, draw: random.Random) -> bool:
    """Kills runs until `kills` kills were done; returns whether all ended as the one that was left alone."""
    begun = time.monotonic()
    if ended(start(recipe, folder / "straight"), 3600) != 0:
        return False
    whole, expected = time.monotonic() - begun, found_in(folder / "straight")
    done, number, good = 0, 0, True
    while done < kills:
        number += 1
        out, here, code = folder / f"killed-{number}", 0, None
        while code is None:
            process = start(recipe, out)
            # The last start of all is left alone; so is, now and then, one that comes to its end by itself.
            code = ended(process, draw.uniform(0, 0.6 * whole) if done < kills else 3600)
            if code is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                done, here = done + 1, here + 1
        found = found_in(out) if code == 0 else {}
        differs = [part for part in expected if found.get(part) != expected[part]]
        parts = [str(path) for path in out.rglob("*.part")]
        good = good and not differs and not parts
        print(f"{out.name}: {here} kills; {differs or 'the same'}{parts or ''}", flush=True)
    print(f"{done} kills in {number} runs of {whole:.1f} s")
    return good


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=["dense", "merged", "dropped"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_mode("quiet")
    with tempfile.TemporaryDirectory() as folder:
        recipe, _ = make_project(
            Path(folder),
            variants=options.variants,
            plan={"repair": "least_squares", "repair_rows": 12},
            finetune={"epochs": 2, "save_steps": 3},
        )
        sys.exit(not kill_until(recipe, Path(folder), options.kills, random.Random(options.seed)))


if __name__ == "__main__":
    main()
