"""Pruning a checkpoint on disk, against `cp` of the same bytes, mergekit, and loading, slicing and saving.

    python benchmarks/prune_checkpoint.py --work DIR --mergekit PYTHON   writes results/prune_checkpoint.json
    python benchmarks/prune_checkpoint.py --work DIR --default   writes results/prune_default.json
    python benchmarks/prune_checkpoint.py --work DIR --hidden 256 --layers 8 --json TRY.json    minutes

PYTHON is that of an environment of its own, never a dependency:

    python -m venv MK && MK/bin/pip install -c constraints.txt mergekit==0.1.5

A random bf16 Llama of each size is written to DIR; 13 of 32 layers are pruned, spread so that hardly two kept
layers are neighbours and little can be copied in one go. Steps take turns for `--pairs` rounds, the order
turning too:

    cp          `cp -r` of a finished pruned folder, then fsync of every file
    default     gradpruner.pruning.on_disk.prune_checkpoint, 13 layers dropped, as users get it:
                verify="auto", what both models compute is compared
    drop        the same with verify="structure": what copying alone takes
    merge       the same, 10 dropped and 3 merged into the layer before them
    naive       from_pretrained, a shorter ModuleList, save_pretrained; then fsync
    mergekit    a passthrough merge of slices; then fsync

One torch thread, as in the other benchmarks; prune_checkpoint checks what it wrote in a thread of its own.
Every step but `cp` is a process of its own. `seconds` is what the call took, libraries imported (those that
load a Llama too); `process_seconds` the whole process. Ratios are of one round; their median counts.
`prune_checkpoint` makes its files durable before it returns, so the goals are judged against cp plus fsync;
the ratio of what is left on either side without fsync stands beside it. `merge` is judged without the time
spent in `merge_linear`, which is reported by itself.

Warm: the source was read in full just before the step. Cold: source (and for cp the copied folder) evicted
with posix_fadvise, what stayed in memory is recorded; this machine's cache only. Memory disk: source and
outputs in /dev/shm, so no disk is waited for; dropping only. Peak RSS is the kernel's VmHWM of the process,
which counts mapped pages of files too; peak anonymous memory is sampled every 20 ms and does not.

`--default` takes only cp and default, of one size, from a warm cache: what most people wait for.

Last, what mergekit and we make of tiny models of other families with one layer dropped. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Only the standard library up here: the parent stays small, and mergekit's environment runs this file too.

RESULT = Path(__file__).parent / "results" / "prune_checkpoint.json"
DEFAULT_RESULT = RESULT.with_name("prune_default.json")
SEED, RANK, VOCABULARY = 0, 8, 32_000
SIZES, LAYERS, PRUNED_SHARE, MERGED = (1792, 2560), 32, 13 / 32, 3
DEFAULT_SIZE = 1408
SHARD_BYTES = 2_000_000_000
MEMORY_DISK = Path("/dev/shm")
GOALS = {"drop_over_cp_at_most": 1.1, "merge_over_cp_at_most": 1.5, "peak_rss_bytes_at_most": 600_000_000}
DEFAULT_GOALS = {"default_over_cp_at_most": 3.0, "default_memory_above_imports_at_most": 1_000_000_000}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
}
FAMILY_LAYERS, FAMILY_DROPPED = 6, 3
Json = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------
# Steps. Each runs in a fresh process, takes JSON values and returns them.


def write_source(folder: str, shape: Json) -> Json:
    """A random Llama, tensor by tensor; the model is never built."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradpruner.pruning.pieces import Piece, pack
    from gradpruner.pruning.writer import write_shards

    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    Path(folder).mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    pool = (torch.randn(32 << 20, generator=torch.Generator().manual_seed(SEED)) * 0.02).bfloat16()

    def values(name: str, size: torch.Size) -> torch.Tensor:
        start = zlib.crc32(name.encode()) % len(pool)
        flat = torch.cat([pool[start:], *[pool] * (size.numel() // len(pool) + 1)])[: size.numel()]
        return (flat + 1 if name.endswith("norm.weight") else flat).view(size)

    def piece(name: str, size: torch.Size) -> Piece:
        return Piece(name, "BF16", tuple(size), 2 * size.numel(), make=lambda: values(name, size))

    pieces = [piece(name, tensor.shape) for name, tensor in state.items()]
    files = write_shards(Path(folder), pack(pieces, SHARD_BYTES), {"format": "pt"})
    return {"parameters": sum(t.numel() for t in state.values()), "tensors": len(state), "files": len(files)}


def write_trace(source: str, target: str, layers: list[list[Any]], steps: int) -> Json:
    """Random gradients of the layers that are merged; rows and columns differ in size, as real ones do."""
    import torch

    from gradpruner.gradients.trace import LinearRef, TraceInfo
    from gradpruner.gradients.trace_writer import TraceWriter
    from gradpruner.pruning.blueprint import Blueprint

    plan = make_plan(layers)
    blueprint = Blueprint(Path(source), plan, without_trace=True)
    merged = sorted(layer for sources in plan.merged.values() for layer in sources)
    linears = [LinearRef(i, n, *r.shape, RANK) for i in merged for n, r in blueprint.linears[i].items()]
    generator = torch.Generator().manual_seed(SEED)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    scales = [(normal(r.out_features, 1).exp() * 1e-6, normal(r.in_features).exp() * 1e-6) for r in linears]
    writer = TraceWriter(linears, Path(target))
    for _ in range(steps):
        grad_b = [normal(len(rows), RANK) * rows for rows, _ in scales]
        grad_a = [normal(RANK, len(columns)) * columns for _, columns in scales]
        writer.add_step(grad_b, grad_a)
    info = TraceInfo(blueprint.view.num_layers, tuple(linears), model=blueprint.fingerprint)
    return {"bytes": writer.finish(info).bytes_on_disk()}


def make_plan(layers: list[list[Any]]) -> Any:
    from gradpruner.plans.layer_plan import LayerAction, PruningPlan

    return PruningPlan(tuple(LayerAction(action, into) for action, into in layers))


def import_llama() -> None:
    """What transformers would import when it first meets a Llama; no part of the work that is timed."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def run_ours(
    source: str, target: str, layers: list[list[Any]], trace: str | None = None, verify: str = "structure"
) -> Json:
    """Wall time of prune_checkpoint, and what its parts took."""
    begin = time.perf_counter()
    from gradpruner.gradients.trace import GradientTrace
    from gradpruner.pruning import in_memory
    from gradpruner.pruning import on_disk as streaming

    import_llama()
    imported = time.perf_counter() - begin
    spent: dict[str, float] = {}
    merged = 0

    def count(weight: Any, sources: Any, **_: Any) -> None:
        nonlocal merged
        merged += weight.numel() * len(sources)

    clock(streaming, "Blueprint", "blueprint", spent)
    clock(streaming, "write_shards", "copying", spent)
    clock(streaming, "verify_checkpoint", "verification", spent)
    clock(in_memory, "merge_linear", "arithmetic", spent, count)
    clock(os, "fsync", "fsync", spent)
    plan, recorded = make_plan(layers), GradientTrace.load(trace) if trace else None
    begin = time.perf_counter()
    before = memory_of("self", "VmHWM")
    report = streaming.prune_checkpoint(
        source, target, plan, recorded, max_shard_bytes=SHARD_BYTES, verify=verify
    )
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "import_seconds": imported,
        "phases": spent,
        "merged_weights": merged,
        "memory_above_imports": memory_of("self", "VmHWM") - before,
        "checks": {check.name: check.detail for check in report.checks},
    }


def clock(
    module: Any, name: str, phase: str, spent: dict[str, float], look: Callable[..., None] | None = None
) -> None:
    """Replaces a function by one that adds up the time spent in it."""
    original = getattr(module, name)
    spent[phase] = 0.0

    def timed(*args: Any, **options: Any) -> Any:
        if look is not None:
            look(*args, **options)
        begin = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            spent[phase] += time.perf_counter() - begin

    setattr(module, name, timed)


def run_naive(source: str, target: str, keep: list[int]) -> Json:
    """What one writes without a tool."""
    begin = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    import_llama()
    imported = time.perf_counter() - begin
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in keep)
    model.config.num_hidden_layers = len(keep)
    model.save_pretrained(target, max_shard_size=SHARD_BYTES)
    return {"seconds": time.perf_counter() - begin, "import_seconds": imported}


def run_mergekit(source: str, target: str, keep: list[int]) -> Json:
    """A passthrough merge, by the function behind mergekit-yaml; in mergekit's environment."""
    begin = time.perf_counter()
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    import_llama()
    imported = time.perf_counter() - begin
    config = MergeConfiguration.model_validate(mergekit_config(source, keep, "bfloat16"))
    options = MergeOptions(copy_tokenizer=False, out_shard_size=SHARD_BYTES, quiet=True)
    begin = time.perf_counter()
    run_merge(config, target, options)
    return {"seconds": time.perf_counter() - begin, "import_seconds": imported}


def mergekit_config(source: str, keep: list[int], dtype: str) -> Json:
    slices = [{"sources": [{"model": source, "layer_range": [a, b]}]} for a, b in runs(keep)]
    return {"merge_method": "passthrough", "dtype": dtype, "slices": slices}


def runs(keep: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive layers."""
    starts = [i for i in keep if i - 1 not in keep]
    return [(i, next(j for j in range(i, keep[-1] + 2) if j not in keep)) for i in starts]


def mergekit_versions() -> Json:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("mergekit", "torch", "transformers", "safetensors")}


def compare(one: str, other: str) -> Json:
    """Whether two checkpoints hold the same tensors, to the bit."""
    from gradpruner.models.shards import open_shards

    first, second = open_shards(Path(one)).tensors, open_shards(Path(other)).tensors
    names = first.keys() | second.keys()
    return {"same_tensors": all(n in first and n in second and equal(first[n], second[n]) for n in names)}


def equal(one: Any, other: Any) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start), b.seek(other.start)
        left = one.num_bytes
        while left:
            part = a.read(min(8 << 20, left))
            if part != b.read(len(part)):
                return False
            left -= len(part)
    return True


def make_families(folder: str) -> Json:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    common |= {"num_hidden_layers": FAMILY_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, options in FAMILIES.items():
        torch.manual_seed(SEED)
        config = AutoConfig.for_model(name, **common, **options)
        AutoModelForCausalLM.from_config(config).save_pretrained(Path(folder) / "source" / name)
    return {}


def family_keep(drop: bool) -> list[int]:
    return [i for i in range(FAMILY_LAYERS) if not drop or i != FAMILY_DROPPED]


def outcome(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return "made"


def families_by_mergekit(folder: str) -> Json:
    """With all layers too, to tell a failure at the missing layer from any other."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def merge(name: str, drop: bool) -> str:
        source = str(Path(folder) / "source" / name)
        target = str(Path(folder) / f"mergekit-{drop}" / name)
        config = mergekit_config(source, family_keep(drop), "float32")
        options = MergeOptions(copy_tokenizer=False, quiet=True)
        return outcome(lambda: run_merge(MergeConfiguration.model_validate(config), target, options))

    return {name: {"all_layers": merge(name, False), "one_dropped": merge(name, True)} for name in FAMILIES}


def families_by_us(folder: str) -> Json:
    """Prunes and verifies in full; verifies in the same way what mergekit made."""
    from gradpruner.plans.layer_plan import PruningPlan
    from gradpruner.pruning.on_disk import prune_checkpoint
    from gradpruner.pruning.verification import verify_checkpoint

    plan = PruningPlan.from_keep(FAMILY_LAYERS, family_keep(True))
    rows: Json = {}
    for name in FAMILIES:
        source, target = Path(folder) / "source" / name, Path(folder) / "ours" / name
        made = outcome(lambda s=source, t=target: prune_checkpoint(s, t, plan, verify="full"))  # type: ignore[misc]
        rows[name] = {"ours": "verified" if made == "made" else made}
        other = Path(folder) / "mergekit-True" / name
        if (other / "config.json").is_file():
            report = verify_checkpoint(other, source, plan, level="full")
            wrong = [f"{check.name}: {check.detail}" for check in report.checks if check.passed is False]
            rows[name]["mergekit_result"] = wrong[0] if wrong else "verified"
    return rows


def describe() -> Json:
    from gradpruner.provenance import provenance

    return provenance(SEED)


STEPS: dict[str, Callable[..., Json]] = {
    step.__name__: step
    for step in (
        write_source, write_trace, run_ours, run_naive, run_mergekit, mergekit_versions, compare,
        make_families, families_by_mergekit, families_by_us, describe,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Running them.


class StepError(Exception):
    """A step failed; the text is the end of what it said."""


def run_step(step: Callable[..., Json], python: str = sys.executable, **options: Any) -> Json:
    """Runs a step in a process of its own; adds wall time and peak memory of the whole process."""
    command = [python, "-W", "ignore", __file__, "--step", step.__name__, json.dumps(options)]
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
    """Waits for the end; the most anonymous memory seen."""
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


def memory_of(pid: int | str, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # it just ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def become_step(name: str, options: str) -> None:
    found = STEPS[name](**json.loads(options))
    print(json.dumps({**found, "peak_rss_bytes": memory_of("self", "VmHWM")}))


def copy_folder(source: Path, target: Path) -> Json:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return {"seconds": time.perf_counter() - begin}


def sync_folder(folder: Path) -> float:
    """Makes every file durable; the seconds it took."""
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
    """Reads every file, so that it is in the page cache."""
    block = bytearray(8 << 20)
    for path in files_of(*folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def evict(*folders: Path) -> None:
    """Asks the kernel to forget every file; clean pages only, so they are synced first."""
    os.sync()
    for path in files_of(*folders):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_memory(*folders: Path) -> float | None:
    """The share of the files' bytes that the page cache holds; None without fincore."""
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
    """Its type, from the longest mount point above the folder."""
    rows = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    above = [row for row in rows if folder.resolve().is_relative_to(row[1])]
    return max(above, key=lambda row: len(row[1]))[2]


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
    """The pruned layers: neither the first nor the last two, as evenly apart as they come."""
    count = round(layers * PRUNED_SHARE)
    return [2 + (2 * i + 1) * (layers - 4) // (2 * count) for i in range(count)]


def actions(layers: int, merged: int) -> list[list[Any]]:
    """Keep, drop or merge; merged ones are spread over the pruned ones."""
    pruned = spread_layers(layers)
    chosen = {pruned[i * (len(pruned) - 1) // max(1, merged - 1)] for i in range(min(merged, len(pruned)))}
    found: list[list[Any]] = [["drop" if i in pruned else "keep", None] for i in range(layers)]
    for layer in chosen:
        found[layer] = ["merge", max(i for i in range(layer) if i not in pruned)]
    return found


class Bench:
    """The steps of one size, in one place (a disk or memory).

    Args:
        folder: For the outputs.
        source: The checkpoint.
        trace: Recorded gradients.
        layers: Its depth.
        mergekit: Python of mergekit's environment.
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
        """One step; its output is removed."""
        inputs = [self.reference if name == "cp" else self.source]
        inputs += [self.trace] if name == "merge" else []
        os.sync()
        (evict if cold else warm)(*inputs)
        held = in_memory(*inputs)
        try:
            row = self._work(name)
            if name not in ("default", "drop", "merge"):  # ours has done so already
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
        """All steps in turns; the order turns too, so that none always follows the same one."""
        rows: dict[str, list[Json]] = {name: [] for name in names}
        for pair in range(pairs):
            start = pair % len(names)
            for name in names[start:] + names[:start]:
                if not any("error" in row for row in rows[name]):
                    rows[name].append(self.run(name))
        return rows


def rounded(value: Any) -> Any:
    """Times to a tenth of a millisecond."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def durable_seconds(row: Json) -> float:
    """The call and its output on disk."""
    return float(row["seconds"] + row.get("sync_seconds", 0.0))


def unsynced_seconds(row: Json) -> float:
    """The call without what it waited for fsync."""
    return float(row["seconds"] - row.get("phases", {}).get("fsync", 0.0))


def process_seconds(row: Json) -> float:
    """From starting Python to the output on disk; cp has no Python."""
    return float(row.get("process_seconds", row["seconds"]) + row.get("sync_seconds", 0.0))


def arithmetic(row: Json) -> float:
    return float(row.get("phases", {}).get("arithmetic", 0.0))


def summarise(rows: dict[str, list[Json]]) -> Json:
    """Ratios within one round: ours over cp, the others over ours."""
    cp, drop = rows["cp"], rows.get("drop", [])
    found: Json = {}
    for name in ("default", "drop", "merge"):
        ours = rows.get(name, [])
        if not ours:
            continue
        pairs = list(zip(ours, cp, strict=True))
        found[name] = {
            "over_cp": spread([(durable_seconds(a) - arithmetic(a)) / durable_seconds(b) for a, b in pairs]),
            "with_arithmetic": spread([durable_seconds(a) / durable_seconds(b) for a, b in pairs]),
            "without_fsync": spread(
                [(unsynced_seconds(a) - arithmetic(a)) / unsynced_seconds(b) for a, b in pairs]
            ),
            "whole_process": spread([process_seconds(a) / durable_seconds(b) for a, b in pairs]),
        }
    for name in ("naive", "mergekit"):
        others = rows.get(name, [])
        if not others or "error" in others[0]:
            continue
        pairs = list(zip(others, drop, strict=True))
        found[name] = {
            "over_drop": spread([durable_seconds(a) / durable_seconds(b) for a, b in pairs]),
            "whole_process": spread([process_seconds(a) / process_seconds(b) for a, b in pairs]),
        }
    return found


def spread(values: list[float]) -> Json:
    return {"median": round(statistics.median(values), 3), "values": [round(value, 3) for value in values]}


def medians(rows: dict[str, list[Json]]) -> Json:
    """Of every figure of a step over its rounds; the largest for memory."""
    found: Json = {}
    for name, steps in rows.items():
        flat = [{**row, **row.get("phases", {})} for row in steps]
        found[name] = {
            key: max(row[key] for row in flat)
            if key.startswith(("peak", "memory"))
            else round(statistics.median(row[key] for row in flat), 4)
            for key, value in flat[0].items()
            if isinstance(value, int | float)
        }
    return found


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


def report(rows: dict[str, list[Json]]) -> Json:
    return {"ratios": summarise(rows), "medians": medians(rows), "rounds": rows}


def measure_in_memory(folder: Path, args: argparse.Namespace) -> Json:
    """Dropping against cp where no disk is waited for; skipped where it would not fit."""
    source, reference = folder / "source", folder / "reference"
    needed = size_of(source) + 2 * size_of(reference)
    shutil.rmtree(reference)  # the pages of the disk's files make room
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
    """What becomes of one dropped layer in other families."""
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
    """What may fail for want of a tool comes first; the sizes are written as they are done."""
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
    """The default against cp, of one size."""
    shape = model_shape(args.sizes[0], args.layers)
    source = work / "source"
    load_before = os.getloadavg()
    made = run_step(write_source, folder=str(source), shape=shape)
    bench = Bench(work, source, work / "no-trace", args.layers, None)
    say(f"{size_of(source) / 1e9:.2f} -> {size_of(bench.reference) / 1e9:.2f} GB, warm")
    rows = bench.rounds(["cp", "default"], args.pairs)
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


def plain(found: Json) -> Json:
    """Without what `run_step` adds."""
    added = ("process_seconds", "peak_anonymous_bytes", "peak_rss_bytes")
    return {key: value for key, value in found.items() if key not in added}


def show(result: Json) -> None:
    for size in result["sizes"]:
        print(f"{size['source_bytes'] / 1e9:.2f} -> {size['output_bytes'] / 1e9:.2f} GB")
        for place in ("disk", "cold", "memory_disk"):
            for name, ratios in size[place].get("ratios", {}).items():
                text = ", ".join(f"{key} {value['median']:.2f}x" for key, value in ratios.items())
                print(f"  {place:12} {name:9} {text}")
        for name, row in size["disk"]["medians"].items():
            if "peak_rss_bytes" in row:
                peak = row["peak_rss_bytes"] / 1e9
                print(f"  {name:9} {row['process_seconds']:6.1f} s, {peak:.2f} GB peak")
        print(f"  same tensors: {size['same_tensors_as_ours']}; met: {size['met']}")
    for name, row in result["mergekit_families"].items():
        print(f"{name:8} {row}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="scratch on the disk to measure; 12 GB")
    parser.add_argument("--default", action="store_true", help="only cp and the default, of one size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", "--hidden", nargs="+", type=int, help="hidden sizes")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=40, help="recorded steps of the merged layers")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in every step")
    parser.add_argument("--mergekit", metavar="PYTHON", help="of an environment with mergekit")
    parser.add_argument("--filesystem", metavar="NOTE", help="anything to say about the disk")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # name, options as JSON
    args = parser.parse_args()
    if args.step:
        become_step(*args.step)
        return
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
