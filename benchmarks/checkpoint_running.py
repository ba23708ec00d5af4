"""Runs the steps of `prune_checkpoint.py`, and controls processes, memory, page cache and disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_steps import Json, memory_of


class StepError(Exception):
    """A step failed; the text is the end of its error output."""


def run_step(step: Callable[..., Json], python: str = sys.executable, **options: Any) -> Json:
    """Runs a step in its own process; adds the wall time and peak memory of the whole process."""
    steps = Path(__file__).with_name("checkpoint_steps.py")
    command = [python, "-W", "ignore", str(steps), step.__name__, json.dumps(options)]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | offline)
        anonymous = watch(process)
        seconds = time.perf_counter() - begin
        out.seek(0), err.seek(0)
        if process.returncode:
            lines = [line for line in err.read().splitlines() if line.strip()]
            raise StepError(" ".join(" ".join(lines[-2:]).split()) or f"exit code {process.returncode}")
        found: Json = json.loads(out.read().splitlines()[-1])
    return {**found, "process_seconds": seconds, "peak_anonymous_bytes": anonymous}


def watch(process: subprocess.Popen[Any]) -> int:
    """Waits for the process to end and returns the peak of its anonymous memory."""
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, memory_of(process.pid, "RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    process.wait()
    ended.set()
    sampler.join()
    return peak


def copy_folder(source: Path, target: Path) -> Json:
    begin, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds, after = time.perf_counter() - begin, os.times()
    worked = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": worked}


def sync_folder(folder: Path) -> float:
    """Syncs every file to disk and returns the seconds it took."""
    begin = time.perf_counter()
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begin


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def warm(*folders: Path) -> None:
    """Reads every file, so that all are in the page cache."""
    block = bytearray(8 << 20)
    for path in files_of(*folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def evict(*folders: Path) -> None:
    """Evicts every file from the page cache; syncs first, because only clean pages can be evicted."""
    os.sync()
    for path in files_of(*folders):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_memory(*folders: Path) -> float | None:
    """Returns the share of the files' bytes in the page cache; None without fincore."""
    if shutil.which("fincore") is None:
        return None
    paths = files_of(*folders)
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    resident = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return min(1.0, round(sum(map(int, resident)) / size_of(*folders), 4))  # whole pages


def files_of(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def size_of(*folders: Path) -> int:
    return sum(path.stat().st_size for path in files_of(*folders))


def filesystem(folder: Path) -> str:
    """Returns the type of a folder's filesystem, from the longest mount point above it."""
    rows = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    above = [row for row in rows if folder.resolve().is_relative_to(row[1])]
    return max(above, key=lambda row: len(row[1]))[2]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
