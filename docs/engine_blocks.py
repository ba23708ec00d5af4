"""Tables of docs/serving.md about pruned models in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drawing import RESULTS, read


def gguf() -> str:
    result = read(RESULTS / "gguf.json")
    rows = result["families"]
    agreeing = [row for row in rows if row["as_said"]]
    types = sorted({row["model_type"] for row in rows})
    right = [t for t in types if all(r["as_said"] for r in rows if r["model_type"] == t)]
    same = [t for t in right if any(r["outcome"] == "same" for r in rows if r["model_type"] == t)]
    lines = [
        f"{len(rows)} cases of {len(types)} model types; in {len(agreeing)} of them llama.cpp did what the verdict "
        "says. For the following types all cases agree, and plans judged ok compute what transformers computes "
        f"(relative error at most {result['config']['same_up_to']:g}): {', '.join(same)}.",
        "",
        "| where it differs | case | verdict | llama.cpp |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if not row["as_said"]:
            found = f"relative error {row['relative_error']}" if "relative_error" in row else row["error"]
            cells = (row["model_type"], f"{row['layers']} layers, {row['plan']}", row["verdict"], found)
            lines.append(f"| {' | '.join(cells)} |")
    if "trained" in result:
        lines += ["", "| trained model | file | cache | relative error | same most likely token |"]
        lines.append("|---|---|---|---|---|")
        for row in result["trained"]["rows"]:
            equal, total = row["likeliest_tokens_equal"]
            cells = (
                row["model"],
                row["file_type"],
                row["cache"],
                row["relative_error"],
                f"{equal} of {total}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"{result['versions']['engine']}; {result['versions']['converter']}."])


def gguf_widths() -> str:
    result = read(RESULTS / "gguf_widths.json")
    plans = ["unpruned", *result["config"]["plans"]]
    subjects: dict[str, dict[str, Any]] = {}
    for row, kind in [(r, ", trained") for r in result["trained"]] + [(r, "") for r in result["families"]]:
        if row["plan"] in plans:
            name = f"{row['model_type']}, {row['layers']} layers{kind}"
            subjects.setdefault(name, {})[row["plan"]] = row
    rows = [row for subject in subjects.values() for row in subject.values() if "verdict" in row]
    agreeing = sum(row["as_said"] for row in rows)
    lines = [
        f"{len(rows)} cases; in {agreeing} of them llama.cpp did what the verdict says.",
        "",
        f"| llama.cpp | {' | '.join(plans)} |",
        "|---" * (len(plans) + 1) + "|",
    ]
    for name, subject in subjects.items():
        cells = [_width_cell(subject[plan]) for plan in plans]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{result['versions']['engine']}; {result['versions']['converter']}."])


def _width_cell(row: dict[str, Any]) -> str:
    if row["outcome"] == "same":
        return f"{row['relative_error']:.0e}"
    if row["outcome"] == "differs":
        return f"wrong: {row['relative_error']:.0e}"
    return "-" if row["outcome"] == "not pruned" else "refused"


BLOCKS: dict[str, Callable[[], str]] = {"gguf": gguf, "gguf_widths": gguf_widths}
