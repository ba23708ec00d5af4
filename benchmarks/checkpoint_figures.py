"""Summaries of the rounds of `prune_checkpoint.py`: ratios within a round, and medians."""

from __future__ import annotations

import statistics
from typing import Any

from checkpoint_steps import Json


def rounded(value: Any) -> Any:
    """Rounds all floats to four digits: times to a tenth of a millisecond."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def durable_seconds(row: Json) -> float:
    """Returns the seconds of the call and of the fsync of its output."""
    return float(row["seconds"] + row.get("sync_seconds", 0.0))


def unsynced_seconds(row: Json) -> float:
    """Returns the seconds of the call without its waits for fsync."""
    return float(row["seconds"] - row.get("phases", {}).get("fsync", 0.0))


def process_seconds(row: Json) -> float:
    """Returns the seconds from the start of Python to the output on disk; cp starts no Python."""
    return float(row.get("process_seconds", row["seconds"]) + row.get("sync_seconds", 0.0))


def arithmetic(row: Json) -> float:
    return float(row.get("phases", {}).get("arithmetic", 0.0))


def summarise(rows: dict[str, list[Json]]) -> Json:
    """Returns ratios within one round: ours over cp, the other tools over ours."""
    cp, drop = rows["cp"], rows.get("drop", [])
    found: Json = {}
    for name in ("floor", "default", "drop", "merge"):
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
        if all("cpu_seconds" in row for row in (*ours, *cp)):
            found[name]["cpu"] = spread([a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs])
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
    """Returns the median of each figure of a step over its rounds; for memory, the largest."""
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


def report(rows: dict[str, list[Json]]) -> Json:
    return {"ratios": summarise(rows), "medians": medians(rows), "rounds": rows}


def plain(found: Json) -> Json:
    """Returns the result of a step without the figures that `run_step` adds."""
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
