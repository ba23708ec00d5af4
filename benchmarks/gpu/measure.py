"""All measurements that need a GPU, in one command that can be repeated: figures of 8 B models.

    python benchmarks/gpu/measure.py --minutes 9 [--model SMOLLM2 --data DATA]    on a machine with a GPU
    python benchmarks/gpu/measure.py --tiny --device cpu --results FOLDER        a trial with tiny models

Parts run in order of importance, each in its own process, and only if they fit into the remaining minutes.
Each finished part is a JSON line in `benchmarks/results/gpu/<device>.jsonl`. A repeated command continues:
parts that were measured, or do not fit into the device's memory, are skipped; parts that failed or ran out of
time come last. Weights are random with real shapes, so nothing is downloaded. Missing packages or models are
listed at the start, with the parts that need them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from journal import FAILED, MEASURED, OUT_OF_TIME, SKIPPED, TOO_LARGE, Journal
from parts import PARTS, Part

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
ROOT = Path(__file__).parents[2]
# Stop this long before the minutes are over, so that an outer time limit does not kill the command.
RESERVE_SECONDS = 5.0
_NO_MEMORY = re.compile(r"out of ?memory|OutOfMemory|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)


def look(device: str) -> dict[str, Any]:
    """Describes this machine; must be called in its own process, so that the planner holds no GPU memory."""
    found: dict[str, Any] = {"missing": _missing(["torch", "psutil", "safetensors"])}
    if found["missing"]:
        return found
    import torch

    from gradpruner.common.provenance import package_versions, provenance

    found["missing"] = _missing({name for part in PARTS for name in part.needs})
    found["provenance"] = provenance(0)
    extra = ("liger-kernel", "flash-attn", "vllm", "triton")
    found["provenance"]["packages"] |= package_versions(extra)
    found["device"] = "cpu"
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
        found["cuda"] = torch.version.cuda
    return found


def _missing(names: Iterable[str]) -> list[str]:
    from importlib.util import find_spec

    return sorted(name for name in names if find_spec(name) is None)


def work(name: str, args: argparse.Namespace, journal: Path) -> dict[str, Any]:
    """Measures one part, in this process."""
    from place import Place

    from gradpruner.common.progress import set_mode

    set_mode("quiet")
    part = next(part for part in PARTS if part.name == name)
    module, _, function = part.function.partition(":")
    place = Place(args.device, args.tiny, journal, args.model, args.data)
    found: dict[str, Any] = getattr(import_module(module), function)(place, **dict(part.options))
    return found


def in_process(command: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Runs this script in a process; returns what it wrote to `out`, or {"error": ...}; ends its children."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # One device only, because a Trainer would spread every batch over several.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *command, "--out", str(out)],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} s", "outcome": OUT_OF_TIME}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if out.exists():
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return found
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
        return {"error": f"ended with code {process.returncode}: {' | '.join(lines[-3:])[-600:]}"}


def answer(args: argparse.Namespace) -> None:
    """Looks at the machine or measures one part, and writes the result; runs in a child process."""
    try:
        found = look(args.device) if args.part == "look" else work(args.part, args, args.journal)
        text = json.dumps(found, allow_nan=False)
    except Exception as error:  # libraries raise all kinds of errors; the next part must still run
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        text = json.dumps({"error": f"{type(error).__name__}: {reason}"})
    args.out.write_text(text, encoding="utf-8")


def run(part: Part, args: argparse.Namespace, journal: Journal, seconds: float) -> dict[str, Any]:
    """Measures one part in its own process; returns the result with its outcome."""
    command = ["--part", part.name, "--device", args.device, "--journal", str(journal.path)]
    command += ["--tiny"] if args.tiny else []
    for name in ("model", "data"):
        command += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    with tempfile.TemporaryDirectory() as folder:
        found = in_process(command, Path(folder) / "found.json", seconds)
    error = found.get("error", "")
    outcome = TOO_LARGE if _NO_MEMORY.search(error) else FAILED if error else MEASURED
    return {"outcome": outcome, **found}


def why_not(part: Part, args: argparse.Namespace, missing: list[str]) -> str:
    """Returns why a part cannot run here; "" if it can."""
    if args.tiny and not part.tiny:
        return "no miniature: it needs a GPU"
    lacking = [name for name in part.needs if name in missing]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    ungiven = [f"--{name}" for name in part.on if getattr(args, name) is None]
    return f"not given: {', '.join(ungiven)}" if ungiven else ""


def in_order(journal: Journal, only: list[str]) -> list[Part]:
    """Returns the parts still to do: first those never started, then those that failed."""
    wanted = [part for part in PARTS if not only or any(part.name.startswith(name) for name in only)]
    again = {FAILED, OUT_OF_TIME}
    left = [part for part in wanted if journal.outcome(part.name) not in (MEASURED, TOO_LARGE)]
    return sorted(left, key=lambda part: journal.outcome(part.name) in again)


def go(args: argparse.Namespace, deadline: float) -> int:
    """Runs the parts that fit before the deadline; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        machine = in_process(["--part", "look", "--device", args.device], Path(folder) / "look.json", 120)
    missing = machine.get("missing", [])
    if "provenance" not in machine:
        print(f"Nothing can be measured: {machine.get('error') or 'not installed: ' + ', '.join(missing)}")
        return 2
    if not machine["device"]:
        print(
            "torch sees no CUDA device here. To try all parts in miniature: --tiny --device cpu --results F"
        )
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    journal = Journal(args.results / f"{slug}{'-tiny' if args.tiny else ''}.jsonl")
    print(f"{machine['device']}: {journal.path}", flush=True)
    todo = in_order(journal, args.only)
    for part in [part for part in todo if why_not(part, args, missing)]:
        reason = why_not(part, args, missing)
        todo.remove(part)
        print(f"  skipped   {part.name}: {reason}", flush=True)
        if journal.lines().get(part.name, {}).get("error") != reason:
            journal.add(part.name, SKIPPED, error=reason)
    for part in todo:
        left = deadline - time.monotonic()
        if left < (part.seconds if not args.tiny else 1.0):
            print(f"  not begun {part.name}: takes about {part.seconds:.0f} s, {max(0, left):.0f} s left")
            continue
        begun = time.monotonic()
        found = run(part, args, journal, left)
        seconds = round(time.monotonic() - begun, 1)
        outcome = found.pop("outcome")
        found |= {key: machine[key] for key in ("device", "cuda", "provenance") if key in machine}
        found |= {"seconds": seconds, "tiny": args.tiny}
        journal.add(part.name, outcome, **found)
        reason = f": {found['error']}" if outcome != MEASURED else ""
        print(f"  {outcome:9} {part.name} ({seconds:.0f} s){reason}", flush=True)
    left_over = [part.name for part in in_order(journal, args.only) if not why_not(part, args, missing)]
    print(
        "All that can run here is measured."
        if not left_over
        else f"Left: {', '.join(left_over)}. The same command goes on."
    )
    return 0


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit for all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to show that all parts run")
    parser.add_argument("--results", type=Path, help="folder of the journals")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M's folder, for the quality study and vLLM")
    parser.add_argument("--data", type=Path, help="folder with trec, banking77 and sst2, for the study")
    parser.add_argument("--only", nargs="*", default=[], help="parts whose names start with one of these")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        answer(args)
        return 0
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu takes hours with real sizes: give --tiny too.")
    if args.tiny and (args.results or RESULTS).resolve() == RESULTS.resolve():
        parser.error("--tiny results are not worth keeping: give another folder with --results FOLDER.")
    for name in ("model", "data"):
        given = getattr(args, name)
        if given is not None and not given.is_dir():
            parser.error(f"--{name}: the folder {given} does not exist.")
    if not any(part.name.startswith(name) for name in args.only or [""] for part in PARTS):
        parser.error(f"--only {' '.join(args.only)}: parts are {', '.join(part.name for part in PARTS)}.")
    args.results = args.results or RESULTS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the running part
    try:
        return go(args, started + 60 * args.minutes - RESERVE_SECONDS)
    except KeyboardInterrupt:
        print("Interrupted; what was measured is kept.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
