"""Pruning a checkpoint on disk, compared with `cp` of the output, mergekit, and load, slice, save.

    python benchmarks/prune_checkpoint.py --work DIR --mergekit PYTHON   writes results/prune_checkpoint.json
    python benchmarks/prune_checkpoint.py --work DIR --default   writes results/prune_default.json
    python benchmarks/prune_checkpoint.py --work DIR --hidden 256 --layers 8 --json TRY.json    minutes

PYTHON is the interpreter of a separate environment; mergekit is not a dependency:

    python -m venv MK && MK/bin/pip install -c constraints.txt mergekit==0.1.5

A random bf16 Llama of each size is written to DIR. 13 of 32 layers are pruned, spread out so that few kept
layers are adjacent and little can be copied in one piece. The steps run in turns for `--pairs` rounds, with
a rotating order:

    cp          `cp -r` of a finished pruned folder, then fsync of every file
    floor       copy, read back and hash, fsync, with hashlib alone; with --default only
    default     gradpruner.pruning.on_disk.prune_checkpoint, 13 layers dropped, with the default
                verify="auto", which compares the outputs of both models
    drop        the same with verify="structure": the time of copying
    merge       the same with 10 layers dropped and 3 merged into the layer before them
    naive       from_pretrained, a shorter ModuleList, save_pretrained; then fsync
    mergekit    a passthrough merge of slices; then fsync

As in the other benchmarks, torch has one thread; prune_checkpoint checks written files in a thread of its
own. Every step except `cp` runs in its own process. `seconds` is the time of the call after all imports,
including those for a Llama; `process_seconds` is the time of the whole process. Ratios are taken within one
round, and their median counts. `prune_checkpoint` syncs its files before it returns, so the goals are checked
against cp plus fsync; the ratio without fsync on either side is reported too. The goal of `merge` leaves out
the time in `merge_linear`, which is reported separately.

Warm means that the source was read in full just before the step. Cold means that the source (for cp, the
copied folder) was evicted from this machine's page cache with posix_fadvise; the share that stayed is
recorded. Memory disk means that source and outputs are in /dev/shm, so that no step waits for a disk; only cp
and drop run there. Peak RSS is the kernel's VmHWM of the process, which includes mapped pages of files; peak
anonymous memory does not include them and is sampled every 20 ms.

`--default` runs only cp, floor and default, for one size and with a warm cache.

Finally, mergekit and prune_checkpoint drop one layer of tiny models of other families. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# No heavy imports here, so that the parent process stays small.
from checkpoint_figures import plain, report, rounded, show
from checkpoint_running import (
    StepError,
    copy_folder,
    evict,
    filesystem,
    in_memory,
    remove,
    run_step,
    say,
    size_of,
    sync_folder,
    warm,
)
from checkpoint_steps import (
    FAMILIES,
    RANK,
    SHARD_BYTES,
    VOCABULARY,
    Json,
    compare,
    describe,
    families_by_mergekit,
    families_by_us,
    make_families,
    mergekit_versions,
    run_floor,
    run_mergekit,
    run_naive,
    run_ours,
    write_source,
    write_trace,
)

RESULT = Path(__file__).parent / "results" / "prune_checkpoint.json"
DEFAULT_RESULT = RESULT.with_name("prune_default.json")
SIZES, LAYERS, PRUNED_SHARE, MERGED = (1792, 2560), 32, 13 / 32, 3
DEFAULT_SIZE = 1408
MEMORY_DISK = Path("/dev/shm")
GOALS = {"drop_over_cp_at_most": 1.1, "merge_over_cp_at_most": 1.5, "peak_rss_bytes_at_most": 600_000_000}
DEFAULT_GOALS = {"default_over_cp_at_most": 3.0, "default_memory_above_imports_at_most": 1_000_000_000}


# ------------------------------------------------------------------------------------------------------------
# One size.


def model_shape(hidden: int, layers: int) -> Json:
    heads = hidden // (128 if hidden >= 1024 else 64)
    return {
        "hidden_size": hidden,
        "intermediate_size": math.ceil(2.7 * hidden / 256) * 256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(n for n in range(1, max(2, heads // 4 + 1)) if heads % n == 0),
        "vocab_size": VOCABULARY,
    }


def spread_layers(layers: int) -> list[int]:
    """Returns the pruned layers, evenly spread and without the first two and the last two layers."""
    count = round(layers * PRUNED_SHARE)
    return [2 + (2 * i + 1) * (layers - 4) // (2 * count) for i in range(count)]


def actions(layers: int, merged: int) -> list[list[Any]]:
    """Returns the action for each layer; merged layers are spread evenly over the pruned ones."""
    pruned = spread_layers(layers)
    chosen = {pruned[i * (len(pruned) - 1) // max(1, merged - 1)] for i in range(min(merged, len(pruned)))}
    found: list[list[Any]] = [["drop" if i in pruned else "keep", None] for i in range(layers)]
    for layer in chosen:
        found[layer] = ["merge", max(i for i in range(layer) if i not in pruned)]
    return found


class Bench:
    """The steps for one size, on a disk or in memory.

    Args:
        folder: Folder for the outputs.
        source: Folder of the checkpoint.
        trace: Folder of recorded gradients.
        layers: Number of layers.
        mergekit: Interpreter of mergekit's environment.
    """

    def __init__(self, folder: Path, source: Path, trace: Path, layers: int, mergekit: str | None) -> None:
        self.source, self.trace, self.mergekit = source, trace, mergekit
        self.reference, self.output = folder / "reference", folder / "output"
        self.dropping, self.merging = actions(layers, 0), actions(layers, MERGED)
        self.keep = [i for i, (action, _) in enumerate(self.dropping) if action == "keep"]
        self.compared: Json = {}
        self._ours(self.reference, self.dropping)

    def _ours(
        self, target: Path, plan: list[list[Any]], trace: Path | None = None, verify: str = "structure"
    ) -> Json:
        recorded = str(trace) if trace else None
        options: Json = {"source": str(self.source), "target": str(target), "layers": plan, "trace": recorded}
        return run_step(run_ours, **options, verify=verify)

    def _other(self, step: Callable[..., Json], python: str) -> Json:
        return run_step(step, python, source=str(self.source), target=str(self.output), keep=self.keep)

    def run(self, name: str, cold: bool = False) -> Json:
        """Runs one step, then removes its output."""
        inputs = [self.reference if name in ("cp", "floor") else self.source]
        inputs += [self.trace] if name == "merge" else []
        os.sync()
        (evict if cold else warm)(*inputs)
        held = in_memory(*inputs)
        try:
            row = self._work(name)
            if name not in ("floor", "default", "drop", "merge"):  # these sync their own output
                row["sync_seconds"] = sync_folder(self.output)
            if name in ("naive", "mergekit") and name not in self.compared:
                self.compared[name] = self._same()
        except StepError as error:
            if name != "mergekit":
                raise
            row = {"error": str(error).replace(str(self.source.parent), "WORK")[:500]}
        remove(self.output)
        say(f"  {name:9} {row.get('seconds', math.nan):7.2f} s" + (" cold" if cold else ""))
        found: Json = rounded({**row, "inputs_in_memory": held})
        return found

    def _work(self, name: str) -> Json:
        if name == "cp":
            return copy_folder(self.reference, self.output)
        if name == "floor":
            return run_step(run_floor, source=str(self.reference), target=str(self.output))
        if name in ("drop", "default"):
            verify = "auto" if name == "default" else "structure"
            return self._ours(self.output, self.dropping, verify=verify)
        if name == "merge":
            return self._ours(self.output, self.merging, self.trace)
        if name == "naive":
            return self._other(run_naive, sys.executable)
        assert self.mergekit is not None
        return self._other(run_mergekit, self.mergekit)

    def _same(self) -> bool:
        return bool(run_step(compare, one=str(self.reference), other=str(self.output))["same_tensors"])

    def rounds(self, names: list[str], pairs: int) -> dict[str, list[Json]]:
        """Runs all steps in turns, rotating the order so that no step always follows the same one."""
        rows: dict[str, list[Json]] = {name: [] for name in names}
        for pair in range(pairs):
            start = pair % len(names)
            for name in names[start:] + names[:start]:
                if not any("error" in row for row in rows[name]):
                    rows[name].append(self.run(name))
        return rows


def measure_size(hidden: int, args: argparse.Namespace, work: Path) -> Json:
    shape = model_shape(hidden, args.layers)
    folder = work / f"hidden-{hidden}"
    source, trace = folder / "source", folder / "trace"
    say(f"hidden {hidden}: writing the source")
    load_before = os.getloadavg()
    made = run_step(write_source, folder=str(source), shape=shape)
    plan = actions(args.layers, MERGED)
    recorded = run_step(write_trace, source=str(source), target=str(trace), layers=plan, steps=args.steps)
    bench = Bench(folder, source, trace, args.layers, args.mergekit)
    names = ["cp", "default", "drop", "merge", "naive"] + ["mergekit"] * bool(args.mergekit)
    say(f"hidden {hidden}: {size_of(source) / 1e9:.2f} -> {size_of(bench.reference) / 1e9:.2f} GB, warm")
    rows = bench.rounds(names, args.pairs)
    cold = {name: [bench.run(name, cold=True)] for name in ("cp", "drop")}
    result = {
        "shape": shape,
        **{key: made[key] for key in ("parameters", "tensors", "files")},
        "source_bytes": size_of(source),
        "output_bytes": size_of(bench.reference),
        "trace_bytes": recorded["bytes"],
        "pruned": [i for i in range(args.layers) if i not in bench.keep],
        "merged": {i: into for i, (_, into) in enumerate(plan) if into is not None},
        "same_tensors_as_ours": bench.compared,
        "disk": {"filesystem": filesystem(folder), "cache": "warm", **report(rows)},
        "cold": {"cache": "evicted before the step", **report(cold)},
        "memory_disk": measure_in_memory(folder, args),
    }
    result["load_average"] = {"before": load_before, "after": os.getloadavg()}
    result["met"] = met(result)
    shutil.rmtree(folder)
    return result


def measure_in_memory(folder: Path, args: argparse.Namespace) -> Json:
    """Measures drop and cp in memory, where nothing waits for a disk; skipped if memory is too small."""
    source, reference = folder / "source", folder / "reference"
    needed = size_of(source) + 2 * size_of(reference)
    shutil.rmtree(reference)  # frees its pages in the cache
    evict(source)
    free = min(shutil.disk_usage(MEMORY_DISK).free, 0.75 * available_memory()) if MEMORY_DISK.is_dir() else 0
    if needed > free:
        return {"skipped": f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB of memory free"}
    say(f"in memory ({MEMORY_DISK})")
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK, prefix="prune-checkpoint-") as name:
        copied = Path(name) / "source"
        shutil.copytree(source, copied)
        evict(source)
        rows = Bench(Path(name), copied, folder / "trace", args.layers, None).rounds(
            ["cp", "drop"], args.pairs
        )
    return {"filesystem": filesystem(MEMORY_DISK), **report(rows)}


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def met(result: Json) -> Json:
    ratios, middle = result["disk"]["ratios"], result["disk"]["medians"]
    limit = GOALS["peak_rss_bytes_at_most"]
    return {
        "drop_over_cp": ratios["drop"]["over_cp"]["median"] <= GOALS["drop_over_cp_at_most"],
        "merge_over_cp": ratios["merge"]["over_cp"]["median"] <= GOALS["merge_over_cp_at_most"],
        "drop_peak_rss": middle["drop"]["peak_rss_bytes"] <= limit,
        "merge_peak_rss": middle["merge"]["peak_rss_bytes"] <= limit,
    }


def measure_families(args: argparse.Namespace, work: Path) -> Json:
    """Drops one layer of models of other families with both tools."""
    say("families")
    folder = work / "families"
    run_step(make_families, folder=str(folder))
    theirs: Json = {}
    if args.mergekit:
        theirs = run_step(families_by_mergekit, args.mergekit, folder=str(folder))
    ours = run_step(families_by_us, folder=str(folder))
    rows = {name: {**ours[name], "mergekit": theirs.get(name)} for name in FAMILIES}
    shutil.rmtree(folder)
    kept: Json = json.loads(json.dumps(rows).replace(str(folder), "WORK"))
    return kept


def measure(args: argparse.Namespace, work: Path) -> Json:
    """Measures everything: first what may fail for lack of a tool, then the sizes, each written when done."""
    begin = time.perf_counter()
    copier = subprocess.run(["cp", "--version"], check=True, capture_output=True, text=True).stdout
    result: Json = {
        "what": "pruning a checkpoint on disk, against cp of the output, mergekit, and load, slice, save",
        "config": {
            "layers": args.layers,
            "pairs": args.pairs,
            "threads": args.threads,
            "trace_steps": args.steps,
            "rank": RANK,
            "shard_bytes": SHARD_BYTES,
            "verify": "structure",
            "cp": copier.splitlines()[0],
            "disk_note": args.filesystem,
        },
        "goal": GOALS,
        "sizes": [],
        "mergekit_environment": plain(run_step(mergekit_versions, args.mergekit)) if args.mergekit else None,
        "mergekit_families": measure_families(args, work),
        "provenance": plain(run_step(describe)),
    }
    for hidden in args.sizes:
        result["sizes"].append(measure_size(hidden, args, work))
        result["seconds"] = round(time.perf_counter() - begin)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def measure_default(args: argparse.Namespace, work: Path) -> Json:
    """Measures the default checks and cp for one size."""
    shape = model_shape(args.sizes[0], args.layers)
    source = work / "source"
    load_before = os.getloadavg()
    made = run_step(write_source, folder=str(source), shape=shape)
    bench = Bench(work, source, work / "no-trace", args.layers, None)
    say(f"{size_of(source) / 1e9:.2f} -> {size_of(bench.reference) / 1e9:.2f} GB, warm")
    rows = bench.rounds(["cp", "floor", "default"], args.pairs)
    found = report(rows)
    ratio = found["ratios"]["default"]["over_cp"]["median"]
    memory = found["medians"]["default"]["memory_above_imports"]
    return {
        "what": "gradpruner prune with its default checks, against cp of the output and fsync",
        "config": {"layers": args.layers, "pairs": args.pairs, "threads": args.threads, "verify": "auto"},
        "goal": DEFAULT_GOALS,
        "shape": shape,
        "parameters": made["parameters"],
        "source_bytes": size_of(source),
        "output_bytes": size_of(bench.reference),
        "pruned": [i for i in range(args.layers) if i not in bench.keep],
        "filesystem": filesystem(work),
        **found,
        "met": {
            "default_over_cp": ratio <= DEFAULT_GOALS["default_over_cp_at_most"],
            "default_memory": memory <= DEFAULT_GOALS["default_memory_above_imports_at_most"],
        },
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "provenance": plain(run_step(describe)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="scratch folder on the disk to measure; takes 12 GB")
    parser.add_argument("--default", action="store_true", help="only cp, floor and default, for one size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", "--hidden", nargs="+", type=int, help="hidden sizes")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=40, help="recorded steps of the merged layers")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every step")
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter of an environment with mergekit")
    parser.add_argument("--filesystem", metavar="NOTE", help="a note about the disk, for the record")
    args = parser.parse_args()
    if args.work is None:
        parser.error("--work is needed")
    args.json = args.json or (DEFAULT_RESULT if args.default else RESULT)
    args.sizes = args.sizes or ([DEFAULT_SIZE] if args.default else list(SIZES))
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the steps
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="prune-checkpoint-") as work:
        if args.default:
            result = measure_default(args, Path(work))
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            say(f"{result['ratios']} met: {result['met']}")
            return
        result = measure(args, Path(work))
    show(result)


if __name__ == "__main__":
    main()
