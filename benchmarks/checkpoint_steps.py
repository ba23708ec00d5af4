"""The steps of `prune_checkpoint.py`: each runs in its own process, with JSON values as input and output.

python benchmarks/checkpoint_steps.py STEP OPTIONS
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Only the standard library is imported here, because mergekit's environment runs this file too.

SEED, RANK, VOCABULARY = 0, 8, 32_000
SHARD_BYTES = 2_000_000_000
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
}
FAMILY_LAYERS, FAMILY_DROPPED = 6, 3
Json = dict[str, Any]


def memory_of(pid: int | str, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # the process has just ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def write_source(folder: str, shape: Json) -> Json:
    """Writes a random Llama tensor by tensor, without building the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradpruner.pruning.checked import reading
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
    with reading() as reader:
        begun = write_shards(Path(folder), pack(pieces, SHARD_BYTES), {"format": "pt"}, reader)
        files = [file.result() for file in begun]
    return {"parameters": sum(t.numel() for t in state.values()), "tensors": len(state), "files": len(files)}


def write_trace(source: str, target: str, layers: list[list[Any]], steps: int) -> Json:
    """Writes random gradients of the merged layers; rows and columns vary in size, as in training."""
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
    """Imports what transformers imports for its first Llama, so that timed work does not include it."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def run_ours(
    source: str, target: str, layers: list[list[Any]], trace: str | None = None, verify: str = "structure"
) -> Json:
    """Runs prune_checkpoint and returns its wall time and that of its parts."""
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
    clock(streaming, "verify_written", "verification", spent)
    clock(in_memory, "merge_linear", "arithmetic", spent, count)
    clock(os, "fsync", "fsync", spent)
    plan, recorded = make_plan(layers), GradientTrace.load(trace) if trace else None
    begin, worked = time.perf_counter(), time.process_time()
    before = memory_of("self", "VmHWM")
    report = streaming.prune_checkpoint(
        source, target, plan, recorded, max_shard_bytes=SHARD_BYTES, verify=verify
    )
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - worked,
        "import_seconds": imported,
        "phases": spent,
        "merged_weights": merged,
        "memory_above_imports": memory_of("self", "VmHWM") - before,
        "checks": {check.name: check.detail for check in report.checks},
    }


def run_floor(source: str, target: str) -> Json:
    """Does what every safe pruning must do: copies files, reads them back to hash them, and syncs them."""
    begin, worked = time.perf_counter(), time.process_time()
    Path(target).mkdir()
    for path in sorted(Path(source).iterdir()):
        copied = Path(target) / path.name
        with path.open("rb") as read, copied.open("wb") as written:
            left = path.stat().st_size
            while left:
                left -= os.copy_file_range(read.fileno(), written.fileno(), left)
        with copied.open("rb") as file:
            hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - worked}


def clock(
    module: Any, name: str, phase: str, spent: dict[str, float], look: Callable[..., None] | None = None
) -> None:
    """Replaces a function by one that adds up the time spent in it on the main thread."""
    original = getattr(module, name)
    spent[phase] = 0.0

    def timed(*args: Any, **options: Any) -> Any:
        if look is not None:
            look(*args, **options)
        begin = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            if threading.current_thread() is threading.main_thread():
                spent[phase] += time.perf_counter() - begin

    setattr(module, name, timed)


def run_naive(source: str, target: str, keep: list[int]) -> Json:
    """Prunes the way people do it without a tool: load, slice, save."""
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
    """Runs a passthrough merge with the function behind mergekit-yaml; needs mergekit's environment."""
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
    """Returns the kept layers as half-open ranges of consecutive layers."""
    starts = [i for i in keep if i - 1 not in keep]
    return [(i, next(j for j in range(i, keep[-1] + 2) if j not in keep)) for i in starts]


def mergekit_versions() -> Json:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("mergekit", "torch", "transformers", "safetensors")}


def compare(one: str, other: str) -> Json:
    """Returns whether two checkpoints hold the same tensors, to the bit."""
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
    """Merges with mergekit, also with all layers, to see whether a failure is due to the dropped layer."""
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
    """Prunes and verifies in full, and verifies mergekit's results in the same way."""
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
    from gradpruner.common.provenance import provenance

    return provenance(SEED)


STEPS: dict[str, Callable[..., Json]] = {
    step.__name__: step
    for step in (
        write_source, write_trace, run_ours, run_floor, run_naive, run_mergekit, mergekit_versions,
        compare, make_families, families_by_mergekit, families_by_us, describe,
    )
}  # fmt: skip


def become_step(name: str, options: str) -> None:
    found = STEPS[name](**json.loads(options))
    print(json.dumps({**found, "peak_rss_bytes": memory_of("self", "VmHWM")}))


if __name__ == "__main__":
    become_step(*sys.argv[1:])
