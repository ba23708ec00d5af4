"""Kills a run at random moments and restarts it; its results must equal those of a run that was never killed.

python benchmarks/kills.py --kills 20

The run uses a tiny model: recording, pruning with repair, fine-tuning with checkpoints, evaluation. If it
ends before its next kill, another run starts in a new folder. Prints a line per folder; exits with 1 if
anything differs: rows, plans, scores, any answer, or any bit of a weight.
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
from gradpruner.runs.recipe.recipe import load_recipe

# Fields for time, memory and resuming; all other fields must be equal.
OF_THE_WAY = {
    "seconds", "method_seconds", "peak_memory_bytes", "method_peak_memory_bytes", "tokens_per_second",
    "resumed_from", "measured_from", "resumed",
}  # fmt: skip
COMPARED = ("model", "data", "trace", "scores", "plans", "variants", "rows", "reference")


def start(recipe: Path, out: Path) -> int:
    """Starts or resumes a run in its own process; returns the process id."""
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
    """Waits up to `seconds` for a process to end; returns its exit code, None if it is still running."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def figures(value: Any) -> Any:
    """Returns a record without the fields in `OF_THE_WAY`."""
    if isinstance(value, dict):
        return {key: figures(inner) for key, inner in value.items() if key not in OF_THE_WAY}
    return [figures(inner) for inner in value] if isinstance(value, list) else value


def found_in(out: Path) -> dict[str, Any]:
    """Returns the record and the files of a finished run, without times."""
    record = json.loads((out / "run.json").read_text())
    files = [path for kind in ("*.safetensors", "examples*.jsonl", "plan*.json") for path in out.rglob(kind)]
    left = {str(path.relative_to(out)): path.read_bytes() for path in files}
    return {"figures": figures({key: record[key] for key in COMPARED}), "files": left}


def kill_until(recipe: Path, folder: Path, kills: int, draw: random.Random) -> bool:
    """Kills runs `kills` times in all; returns whether all ended like the run that was never killed."""
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
            # After the last kill, the run may finish. Earlier runs sometimes finish before their next kill.
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
    """Runs the check from the command line."""
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
