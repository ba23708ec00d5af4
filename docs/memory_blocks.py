"""Tables of docs/scale.md about memory: estimates against measurements, and several devices."""

from __future__ import annotations

from collections.abc import Callable

from drawing import RESULTS, read

from gradpruner.common.printing import readable_bytes


def memory_estimate() -> str:
    """The table of estimated peaks against the bytes torch's allocator handed out."""
    result = read(RESULTS / "memory_estimate.json")
    lines = ["| fine-tuning | estimated | measured | estimated / measured |", "|---|---|---|---|"]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['case']} | | {row['error']} | |")
            continue
        estimated, measured = map(readable_bytes, (row["estimate"]["peak"], row["measured_bytes"]))
        lines.append(f"| {row['case']} | {estimated} | {measured} | {row['ratio']:.3f} |")
    config = result["config"]
    note = (
        f"A random Llama of {config['parameters'] / 1e6:.1f} M parameters, {config['layers']} layers, batches of "
        f"{config['batch_size']} x {config['tokens']} tokens, on a CPU (`benchmarks/memory_estimate.py`)."
    )
    return "\n".join([*lines, "", note])


def recording_memory() -> str:
    """One sentence: the peak memory of recording against the same LoRA training without it."""
    result = read(RESULTS / "methods_memory.json")
    row = next(row for row in result["rows"] if row["what"] == "evidence")
    config = result["config"]
    return (
        f"Measured (`benchmarks/methods_memory.py`): recording peaks at {row['peak_over_lora']:.2f}x the memory of the "
        f"same LoRA training without it, {config['parameters'] / 1e6:.0f} M parameters, {row['device']}, "
        f"{config['rounds']} round; the goal is at most {result['goal']['evidence_peak_over_lora_at_most']}x."
    )


def scaling() -> str:
    """The tables of what each device holds at several sizes."""
    lines = [
        "| model, devices | mode, strategy | weights | gradients | optimizer | exchange | activations | at most | fits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for path in sorted((RESULTS / "scaling").glob("*.json"), key=lambda p: read(p)["parameters"]):
        found = read(path)
        count = found["processes"]
        name = f"{found['model']}, {count} x {readable_bytes(found['device_bytes'])}"
        for row in found["rows"]:
            if row["mode"] == "qlora" and count > 1:
                continue
            parts = ("weights", "gradients", "optimizer", "exchange", "working", "peak")
            cells = " | ".join("?" if row[part] is None else readable_bytes(row[part]) for part in parts)
            fits = "yes" if row["fits"] else "no"
            lines.append(f"| {name} | {row['mode']}, {row['strategy']} | {cells} | {fits} |")
        if count > 1:
            stages = {key: readable_bytes(value) for key, value in found["stages"].items()}
            notes.append(
                f"| {found['model']} | {stages['checkpoint']} | {stages['trace']} | {stages['trace_in_memory']} | "
                f"{stages['gathered']} | {stages['gathered_at_a_time']} | {stages['surgery_read']} | "
                f"{stages['surgery_written']} |"
            )
    work = found["workload"]
    return "\n".join(
        [
            *lines,
            "",
            f"Each device has batches of {work['batch_size']} x {work['tokens']} tokens, all learned, gradient "
            "checkpointing, AdamW. *exchange*: DDP's buckets, or the layers FSDP2 holds whole at a time; DeepSpeed's "
            "buffers are not counted. *at most*: of gradients and activations only the larger counts, because gradients appear "
            "as activations are freed.",
            "",
            "| model | checkpoint | trace, 40 steps | trace in memory | gathered on the first host | on its device at a "
            "time | pruning reads | pruning writes |",
            "|---|---|---|---|---|---|---|---|",
            *notes,
        ]
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "memory_estimate": memory_estimate,
    "recording_memory": recording_memory,
    "scaling": scaling,
}
