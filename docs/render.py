"""Fills figures from the committed JSON into the documents.

    python docs/render.py            rewrite README.md and docs/*.md
    python docs/render.py --check    fail if any of them is out of date

A block is the text between `<!-- figures: NAME -->` and `<!-- end -->`. The function BLOCKS[NAME] writes all of it;
nothing there is written by hand.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ablation_blocks
import cost_blocks
import engine_blocks
import gpu_blocks
import memory_blocks
import methods
import pruning_blocks
import quality_blocks
import quality_compared
import quality_cost
import quality_drawing
import quality_writing
from drawing import RESULTS, machine, read, script, times

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def real_tasks() -> str:
    module = script("real_tasks")
    cells = module.load_cells()
    total = len(module.TASKS) * len(module.MODES) * len(module.SEEDS)
    note = f"Mean over seeds, lowest to highest in brackets. {len(cells)} of {total} cells measured so far."
    return f"{module.markdown(cells)}\n\n{note}"


def learning_rates() -> str:
    sweep = read(RESULTS / "learning_rates.json")
    lines = ["| mode | learning rate | exact match |", "|---|---|---|"]
    for row in sweep["rows"]:
        mark = " (chosen)" if sweep["best"][row["mode"]] == row["learning_rate"] else ""
        lines.append(f"| {row['mode']} | {row['learning_rate']:g}{mark} | {row['exact_match']:.3f} |")
    return "\n".join(lines) + f"\n\n{sweep['what'].capitalize()}."


def demo() -> str:
    facts = read(ROOT / "gradpruner" / "demo" / "measure.json")
    training = read(ROOT / "gradpruner" / "demo" / "pretrain.json")
    best = max(facts["full_finetuning"], key=lambda run: run["exact_match"])
    lora = max(facts["lora_finetuning"], key=lambda run: run["exact_match"])
    rises = facts["single_layer_loss_increase"]
    dropped = facts["dropped"]["late_middle"]
    return "\n".join(
        [
            f"A Llama of {training['parameters'] / 1e6:.1f} M parameters and 16 layers, pre-trained on "
            f"{training['tokens'] / 1e6:.1f} M tokens of generated text ({training['seconds'] / 60:.0f} "
            f"minutes), and a six-way classification task with {facts['rows']['train']} training and "
            f"{facts['rows']['test']} test rows.",
            "",
            "| measured | value |",
            "|---|---|",
            f"| held-out loss, against a unigram model's {facts['held_out_loss']['unigram']:.2f} "
            f"| {facts['held_out_loss']['dense']:.2f} |",
            f"| zero-shot exact match (most frequent answer: {facts['majority_class']:.2f}) "
            f"| {facts['zero_shot']['exact_match']:.3f} |",
            f"| fine-tuned dense, full / LoRA | {best['exact_match']:.3f} / {lora['exact_match']:.3f} |",
            f"| held-out loss with layers {dropped['layers'][0]}-{dropped['layers'][-1]} dropped, before "
            f"fine-tuning | {dropped['held_out_loss']:.2f} |",
            f"| the same, fine-tuned | {dropped['finetuned']['exact_match']:.3f} |",
            f"| loss increase when one layer is removed, least to most "
            f"| {min(rises):.3f} to {max(rises):.3f} |",
        ]
    )


def recipe_run(name: str) -> str:
    result = read(RESULTS / f"{name}_run.json")
    took = result["seconds"]
    shown = f"{took:.0f} s" if took < 600 else f"{took / 60:.0f} minutes"
    beside = ", with other work beside it, so times are too long" if result.get("busy") else ""
    return f"{result['table'].strip()}\n\nAll stages together: {shown} on {machine(result)}{beside}."


def training_step() -> str:
    result = read(RESULTS / "training_step.json")
    window, bf16 = result["ratios"]["answer_window"], result["ratios"]["bf16"]
    capability = result["provenance"]["cpu_capability"]
    return (
        f"Measured on an {capability} CPU (`benchmarks/training_step.py`): a training step of the 8 M model "
        f"takes {window:.2f}x the time with the window of logits, and {bf16:.0f}x in bf16."
    )


def fast_products() -> str:
    result = read(RESULTS / "fast_products.json")
    step, forward = result["ratios"]["training step"], result["ratios"]["forward pass"]
    return (
        f"Measured with a model of SmolLM2-135M's shape on {machine(result)} (`benchmarks/fast_products.py`): a "
        f"training step takes {step:.2f}x the time, a forward pass {forward:.2f}x; logits differ by "
        f"{result['relative_difference_of_logits']:.0e}."
    )


def speed() -> str:
    recording, scoring, merging = (read(RESULTS / f"{n}.json") for n in ("recording", "scoring", "merging"))
    recorder, dense = recording["ratios"]["recorder"], recording["ratios"]["dense"]
    shape = recording["config"]
    rows = [
        (
            f"step time with recording (hidden {shape['hidden']}, "
            f"{shape['tokens_per_step']:,} tokens a step)",
            f"{recorder['step_time_inside']:.4f}x of the same LoRA step without",
            f"<= {recording['goal']['recorder_step_time_inside_at_most']}x",
            recording["met"],
        ),
        (
            "the same, accumulating dense matrices",
            f"{dense['step_time_inside']:.4f}x, "
            f"{dense['kept_tensor_bytes'] / recorder['kept_tensor_bytes']:.0f}x the tensors kept in memory",
            "",
            None,
        ),
        (
            "scores of a Llama-3.1-8B layer by Gram matrices",
            f"{scoring['ratios']['squares_over_gram']:.0f}x faster than forming the products, relative error "
            f"{scoring['ratios']['largest_relative_error']:.0e}",
            f">= {scoring['goal']['squares_over_gram_at_least']:.0f}x, "
            f"<= {scoring['goal']['relative_error_at_most']:.0e}",
            all(scoring["met"].values()),
        ),
    ]
    for dtype, ratio in merging["ratios"].items():
        goal = merging["goal"]
        rows.append(
            (
                f"merging three 14336 x 4096 linears, 40 steps, {dtype}",
                f"{ratio['time']:.1f}x faster than the released code's algorithm, {ratio['extra_memory']:.2f}x the "
                "fp32 weight in extra memory",
                f">= {goal['time_ratio_at_least']:.0f}x, <= {goal['extra_memory_over_fp32_weight_at_most']}x",
                all(merging["met"][dtype].values()),
            )
        )
    lines = ["| what | measured | goal | met |", "|---|---|---|---|"]
    for what, measured, goal_text, met in rows:
        lines.append(
            f"| {what} | {measured} | {goal_text} | {'' if met is None else 'yes' if met else '**no**'} |"
        )
    lines.append("")
    lines.append("Ratios within one run, on one CPU thread; scripts and raw figures are in `benchmarks/`.")
    return "\n".join(lines)


def families() -> str:
    """The table of families."""
    from gradpruner.models.families import FAMILIES

    merged = [name for name, row in FAMILIES.items() if not row.no_merge]
    dropped = [name for name, row in FAMILIES.items() if row.no_merge]
    return (
        f"{len(FAMILIES)} model types. Layers can be dropped or merged: {', '.join(merged)}.\n\n"
        "Layers can only be dropped (mixtures of experts, whose experts do not correspond across layers): "
        f"{', '.join(dropped)}."
    )


def tasks() -> str:
    """The table of tasks."""
    from gradpruner.data.tasks import TASKS

    rows = read(ROOT / "tests" / "task_rows.json")
    head = ("task", "hub dataset", "learn / measure", "answer", "metric", "paper", "version")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in TASKS.names():
        task = TASKS.find(name)
        source = task.hub_id + (f", {task.hub_config}" if task.hub_config else "")
        held_out = f" ({task.hold_out:,} rows held out)" if task.hold_out else ""
        limit = f" ({task.train_limit:,} training rows)" if task.train_limit else ""
        splits = f"{task.train_split} / {task.eval_split}{held_out}"
        answer = "one of the choices" if task.examples(rows[name], "train")[0].choices else "free text"
        metric = task.metric.replace("_", " ") + (" (probe)" if task.probe else "")
        paper = task.paper + limit
        lines.append(f"| {name} | {source} | {splits} | {answer} | {metric} | {paper} | {task.version} |")
    return "\n".join(lines)


def evaluation() -> str:
    result = read(RESULTS / "evaluation.json")
    config, goal = result["config"], result["goal"]["choices_speedup"]
    lines = [
        f"| against lm-eval {config['lm_eval']}, Hugging Face backend | examples/s | ratio | goal | met |",
        "|---|---|---|---|---|",
    ]
    for name, case in result["choices"].items():
        same, total = case["same_choice"]
        speed, ratio = case["examples_per_second"], case["speedup"]
        met = "yes" if ratio["ours"] >= goal else "**no**"
        lines.append(
            f"| ARC-Easy, {name} ({same} of {total} choices the same) "
            f"| {speed['ours']:.0f} against {speed['lm_eval']:.0f} "
            f"| {spread(case, 'ours')} | >= {goal:.0f}x | {met} |"
        )
        alone = "ours, prompts not shared"
        lines.append(f"| the same, prompts not shared | {speed[alone]:.0f} | {spread(case, alone)} | | |")
    texts = result["generation"]
    same, total = texts["same_text"]
    speed = texts["examples_per_second"]
    lines.append(
        f"| {config['new_tokens']} greedy tokens ({same} of {total} texts the same) "
        f"| {speed['ours']:.1f} against {speed['lm_eval']:.1f} | {spread(texts, 'ours')} | | |"
    )
    largest = max(case["largest_difference_nats"] for case in result["choices"].values())
    threads = "one thread" if config["threads"] == 1 else f"{config['threads']} threads"
    return "\n".join(
        [
            *lines,
            "",
            f"{config['model']}, {config['parameters'] / 1e6:.0f} M parameters, batches of "
            f"{config['batch_size']}, {threads} of {machine(result)}; the largest difference of a "
            f"log-likelihood is {largest:.0e} nats (`benchmarks/evaluation.py`).",
        ]
    )


def spread(case: dict[str, Any], name: str) -> str:
    """A speed-up over lm-eval, with the lowest and highest of the rounds."""
    seconds = case["raw_seconds"]
    ratios = [theirs / own for theirs, own in zip(seconds["lm_eval"], seconds[name], strict=True)]
    return f"{times(statistics.median(ratios))} ({min(ratios):.2f} to {max(ratios):.2f})"


def finetuning() -> str:
    result = read(RESULTS / "finetuning.json")
    goal = result["goal"]
    limit = goal if isinstance(goal, int | float) else next(iter(goal.values()))
    names = {
        "plain": "plain `Trainer`, padded", "window": "gradpruner, padded, logits of learned tokens only",
        "grouped": "gradpruner, batches of similar length", "packed": "gradpruner, packed (the default)",
    }  # fmt: skip
    lines = [
        "| task | training | tokens/s | ratio to plain | padding | goal | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, found in result["tasks"].items():
        for path, row in found["paths"].items():
            ratio = row["ratio_to_plain"]
            ends = (f">= {limit:g}x", "yes" if ratio >= limit else "**no**") if path == "packed" else ("", "")
            cells = (
                task, names.get(path, path), f"{row['tokens_per_second']:,.0f}", times(ratio),
                f"{100 * row['padding_fraction']:.0f} %", *ends,
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    config = result["config"]
    return "\n".join(
        [
            *lines,
            "",
            f"Full fine-tuning of {config['model']}, batches of {config['batch_size']}, {config['precision']}, "
            f"{machine(result)}; tokens per second without padding; median of {config['rounds']} rounds "
            "in turns (`benchmarks/finetuning.py`).",
        ]
    )


def all_tasks() -> str:
    module = script("all_tasks")
    return str(module.markdown(module.load_cells()))


BLOCKS: dict[str, Callable[[], str]] = {
    "real_tasks": real_tasks,
    "learning_rates": learning_rates,
    "demo": demo,
    "demo_run": partial(recipe_run, "demo"),
    "smollm2_run": partial(recipe_run, "smollm2"),
    "speed": speed,
    "families": families,
    "tasks": tasks,
    "training_step": training_step,
    "fast_products": fast_products,
    "evaluation": evaluation,
    "finetuning": finetuning,
    "all_tasks": all_tasks,
    **methods.BLOCKS,
    **ablation_blocks.BLOCKS,
    **cost_blocks.BLOCKS,
    **engine_blocks.BLOCKS,
    **memory_blocks.BLOCKS,
    **pruning_blocks.BLOCKS,
    **gpu_blocks.BLOCKS,
    **quality_blocks.BLOCKS,
    **quality_compared.BLOCKS,
    **quality_cost.BLOCKS,
    **quality_writing.BLOCKS,
}
DRAWINGS = {
    "comparison.svg": (methods.comparison_digest, methods.draw_comparison),
    "ablations.svg": (ablation_blocks.shown, ablation_blocks.draw),
    "quality.svg": (quality_drawing.shown, quality_drawing.draw),
}
"""File -> function that gives the digest of its data, and function that draws it."""


def render(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}"

    return BLOCK.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "LOG.md"]:
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new, encoding="utf-8")
    for name, (shown, draw) in DRAWINGS.items():
        plot = ROOT / "docs" / name
        if not plot.exists() or shown() not in plot.read_text(encoding="utf-8"):
            stale.append(str(plot.relative_to(ROOT)))
            if not args.check:
                plot.write_text(draw(), encoding="utf-8")
    if stale and args.check:
        print(f"Out of date: {', '.join(stale)}. Run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
