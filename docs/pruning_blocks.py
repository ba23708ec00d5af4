"""Tables of docs/results.md about pruning a checkpoint on disk."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from drawing import RESULTS, dig, machine, read, times

from gradpruner.common.printing import readable_bytes


def prune_checkpoint() -> str:
    result = read(RESULTS / "prune_checkpoint.json")
    sizes, goal = result["sizes"], result["goal"]
    first = sizes[0]
    dropped = f"{len(first['pruned'])} of {result['config']['layers']} layers dropped"
    merged = f"{len(first['pruned']) - len(first['merged'])} dropped, {len(first['merged'])} merged"
    fast, slow = (f"<= {goal[f'{step}_over_cp_at_most']}x" for step in ("drop", "merge"))
    small = f"<= {readable_bytes(goal['peak_rss_bytes_at_most'])}"
    rows: list[tuple[str, str, Callable[[float], str], str, str]] = [
        (f"{dropped}, over `cp` and fsync", "disk.ratios.drop.over_cp.median", times, fast, "drop_over_cp"),
        ("the same, both without fsync", "disk.ratios.drop.without_fsync.median", times, "", ""),
        ("the same, the whole gradpruner process", "disk.ratios.drop.whole_process.median", times, "", ""),
        ("the same with fsync, cold cache", "cold.ratios.drop.over_cp.median", times, "", ""),
        ("the same in memory, no disk", "memory_disk.ratios.drop.over_cp.median", times, "", ""),
        (
            f"{merged}, without the time of `merge_linear`",
            "disk.ratios.merge.over_cp.median",
            times,
            slow,
            "merge_over_cp",
        ),
        (f"{merged}, with that time", "disk.ratios.merge.with_arithmetic.median", times, "", ""),
        ("peak RSS, dropping", "disk.medians.drop.peak_rss_bytes", readable_bytes, small, "drop_peak_rss"),
        ("peak RSS, merging", "disk.medians.merge.peak_rss_bytes", readable_bytes, small, "merge_peak_rss"),
        ("load, slice, save: time over dropping", "disk.ratios.naive.over_drop.median", times, "", ""),
        ("its peak RSS", "disk.medians.naive.peak_rss_bytes", readable_bytes, "", ""),
        ("its peak anonymous memory", "disk.medians.naive.peak_anonymous_bytes", readable_bytes, "", ""),
        ("mergekit passthrough: time over dropping", "disk.ratios.mergekit.over_drop.median", times, "", ""),
        ("its peak RSS", "disk.medians.mergekit.peak_rss_bytes", readable_bytes, "", ""),
        ("its peak anonymous memory", "disk.medians.mergekit.peak_anonymous_bytes", readable_bytes, "", ""),
    ]
    heads = [from_to(size) for size in sizes]
    lines = [f"| measured | {' | '.join(heads)} | goal | met |", "|---" * (len(sizes) + 3) + "|"]
    for what, path, form, limit, key in rows:
        cells = " | ".join("" if (found := dig(size, path)) is None else form(found) for size in sizes)
        met = ("yes" if all(size["met"][key] for size in sizes) else "**no**") if key else ""
        lines.append(f"| {what} | {cells} | {limit} | {met} |")
    return "\n".join([*lines, "", checkpoint_conditions(result), "", *other_families(result)])


def prune_default() -> str:
    result = read(RESULTS / "prune_default.json")
    ratios, middle, goal = result["ratios"]["default"], result["medians"]["default"], result["goal"]
    met = {key: "yes" if value else "**no**" for key, value in result["met"].items()}
    dropped = f"{len(result['pruned'])} of {result['config']['layers']} layers dropped"
    parts = ", ".join(
        f"{name} {middle[name]:.1f} s" for name in ("blueprint", "copying", "verification", "fsync")
    )
    floor = result["ratios"].get("floor")  # newer results only
    return "\n".join(
        [
            f"| `gradpruner prune`, {from_to(result)} | measured | goal | met |",
            "|---|---|---|---|",
            f"| {dropped}, over `cp` and fsync | {times(ratios['over_cp']['median'])} | "
            f"<= {goal['default_over_cp_at_most']:.0f}x | {met['default_over_cp']} |",
            f"| the same, both without fsync | {times(ratios['without_fsync']['median'])} |  |  |",
            *(
                [f"| copy, hash and fsync alone | {times(floor['over_cp']['median'])} |  |  |"]
                if floor
                else []
            ),
            f"| peak RSS above the imported libraries | {readable_bytes(middle['memory_above_imports'])} | "
            f"<= {readable_bytes(goal['default_memory_above_imports_at_most'])} | {met['default_memory']} |",
            "",
            f"A random bf16 Llama on {machine(result)} ({result['filesystem']}), one thread, warm cache; the "
            f"median of {result['config']['pairs']} rounds. {middle['seconds']:.1f} s: {parts}.",
        ]
    )


def from_to(result: dict[str, Any]) -> str:
    """The sizes of the source and of the pruned checkpoint."""
    return " -> ".join(readable_bytes(result[f"{which}_bytes"]) for which in ("source", "output"))


def checkpoint_conditions(result: dict[str, Any]) -> str:
    config, last = result["config"], result["sizes"][-1]
    drop, merge = (last["disk"]["medians"][step] for step in ("drop", "merge"))
    disk = ", ".join(filter(None, (last["disk"]["filesystem"], config["disk_note"])))
    threads = "one thread" if config["threads"] == 1 else f"{config['threads']} threads"
    return (
        f"Random bf16 Llamas on {machine(result)} ({disk}). Ratios within a round, the median of "
        f"{config['pairs']}. The source was read just before, except with a cold cache. Importing libraries is counted only "
        "in the whole process. At the last size, "
        f"{drop['blueprint'] + drop['verification']:.1f} of the {drop['seconds']:.1f} s of dropping are spent on "
        "planning and on verifying the structure, and `merge_linear` processes "
        f"{merge['merged_weights'] / merge['arithmetic'] / 1e6:.1f} M weights/s ({config['trace_steps']} "
        f"recorded steps, {threads}). {merging_rates()}"
    )


def merging_rates() -> str:
    """One sentence: weights per second of one large linear, with our algorithm and with the released code's."""
    merging = read(RESULTS / "merging.json")
    weights, row = math.prod(merging["config"]["shape"]), merging["raw"]["bf16"]
    ours = weights * merging["config"]["sources"] / statistics.median(row["ours_seconds"])
    released = weights / statistics.median(row["released_one_source_seconds"])
    return (
        f"On one large bf16 linear it processes {ours / 1e6:.1f} M weights/s, and the released code's algorithm "
        f"{released / 1e6:.1f} M (`benchmarks/merging.py`)."
    )


def other_families(result: dict[str, Any]) -> list[str]:
    if not result["mergekit_environment"]:
        return []
    version = result["mergekit_environment"]["mergekit"]
    lines = [f"| one of six layers dropped | mergekit {version} | gradpruner |", "|---|---|---|"]
    for name, row in result["mergekit_families"].items():
        theirs = row.get("mergekit_result") or row["mergekit"]["one_dropped"]
        lines.append(f"| {name} | {theirs} | {row['ours']} |")
    return [
        *lines,
        "",
        "Verified: it loads, and computes what its source computes with that layer passed through.",
    ]


BLOCKS: dict[str, Callable[[], str]] = {
    "prune_checkpoint": prune_checkpoint,
    "prune_default": prune_default,
}
