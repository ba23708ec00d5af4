"""The tables and the drawing of docs/ablations.md; see render.py."""

from __future__ import annotations

from typing import Any

from drawing import as_svg, digest, plotting, script

COLOURS = ("#2563a8", "#b4552d", "#4d7c2e", "#7b4fa3", "#9a7b1c", "#4a4a4a")
COLUMNS = 3


def measured() -> str:
    """One table per measured ablation, in the paper's order."""
    module = script("ablations")
    parts = []
    for study in in_order(module):
        seeds = f"{len(study['seeds'])} seeds"
        parts += [f"**{study['figure']}: {study['title'].lower()}** ({seeds})", module.markdown(study)]
    return "\n\n".join(parts) or "None so far."


def in_order(module: Any) -> list[dict[str, Any]]:
    """The committed studies, tables before figures."""
    studies = module.load_studies().values()

    def place(study: dict[str, Any]) -> tuple[bool, int]:
        kind, number = study["figure"].split()[:2]
        return kind.startswith("Fig"), int("".join(c for c in number if c.isdigit()))

    return sorted(studies, key=place)


def points(module: Any, study: dict[str, Any]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Row -> (position of the setting, quality) of every measured setting."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for place, point in enumerate(study["points"]):
        for row in point["rows"]:
            if module.quality(row):
                found.setdefault(row["label"], []).append((place, module.quality(row)))
    return found


def draw() -> str:
    """One panel per ablation: means over seeds with their range, over the settings."""
    pyplot = plotting()
    pyplot.rcParams["font.size"] = 8
    module = script("ablations")
    studies = in_order(module)
    lines = -(-len(studies) // COLUMNS)
    figure, grid = pyplot.subplots(lines, COLUMNS, figsize=(10.5, 2.7 * lines), squeeze=False)
    for axes in grid.flat[len(studies) :]:
        axes.axis("off")
    for axes, study in zip(grid.flat, studies, strict=False):
        names = [module.setting(study, point) for point in study["points"]]
        joined = "" if study["plot"]["kind"] == "bars" else "-"
        found = points(module, study)
        colour = iter(COLOURS)
        for shift, (label, values) in enumerate(found.items()):
            dense = label == "Dense"
            level = [place + 0.06 * (shift - len(found) / 2) for place, _ in values]
            means = [100 * quality["mean"] for _, quality in values]
            reach = [
                [100 * (quality["mean"] - quality["low"]) for _, quality in values],
                [100 * (quality["high"] - quality["mean"]) for _, quality in values],
            ]
            axes.errorbar(
                level, means, yerr=reach, label=label, markersize=3.5, linewidth=1.0, capsize=2,
                marker="_" if dense else "o", linestyle=":" if dense else joined,
                color="black" if dense else next(colour),
            )  # fmt: skip
        axes.set_title(f"{study['figure']}: {study['title'].lower()}", fontsize=8.5)
        slanted = {"rotation": 20, "ha": "right"} if max(map(len, names)) > 6 else {}
        axes.set_xticks(range(len(names)), names, **slanted)
        axes.set_xlabel(study["sweep"]["label"] if study["sweep"] else "")
        axes.grid(axis="y", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.22)
        axes.legend(frameon=False, fontsize=6.5, loc="upper left", ncols=len(found), handlelength=1.2)
    for axes in grid[:, 0]:
        axes.set_ylabel("exact match, %")
    figure.tight_layout()
    return as_svg(figure, shown())


def shown() -> str:
    """The digest of the data the drawing shows."""
    module = script("ablations")
    return digest([[study["title"], points(module, study)] for study in in_order(module)])


BLOCKS = {"ablations": measured}
