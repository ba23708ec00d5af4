"""Fine-tuning compared with a plain `transformers.Trainer`: real tokens per second on rows of real tasks.

    python benchmarks/finetuning.py --model M --data D    writes benchmarks/results/finetuning.json; 6 minutes
    python benchmarks/finetuning.py --model M --data D --quick    two steps each; writes nothing

D holds one folder per task in its hub schema. Every path runs the same number of steps of full fine-tuning,
with the same initial weights and the same AdamW:

    plain      transformers.Trainer: random batches, padded to the longest, logits at every position
    window     ours, with logits only at answer tokens
    grouped    window, and batches of samples of similar length
    packed     window, and samples packed end to end (the default)

All paths except `grouped` see the same samples in the same order, and their last losses are compared.
`grouped` groups the first 2,048 rows, as a run over all of them would, and trains on some of those batches.
Each measurement runs in its own process, and the paths take turns. A real token is any token but padding. The
time covers everything from creating the Trainer (with the trial that packing needs) to the end of training.
Processor seconds are reported beside wall seconds: with one thread, the two are equal on a quiet machine.
`mixed` takes rows of five tasks in turns, as in instruction data. `window` and `grouped` run on the first
task only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from gradpruner.common.provenance import provenance
from gradpruner.data.examples import Example

RESULT = Path(__file__).parent / "results" / "finetuning.json"
PATHS = ("plain", "window", "grouped", "packed")
SEED, BATCH, STEPS, ROUNDS, MAX_LENGTH = 0, 32, 4, 3, 512
POOL = 2048
GOAL = 2.0
LETTERS = "ABCDE"


def _options(texts: list[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def fingpt_sentiment(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['instruction']}\n{row['input']}\nAnswer:", row["output"]


def medmcqa(row: dict[str, Any]) -> tuple[str, str]:
    options = _options([row["opa"], row["opb"], row["opc"], row["opd"]])
    return f"{row['question']}\n{options}\nAnswer:", LETTERS[int(row["cop"]) - 1]


def arc_easy(row: dict[str, Any]) -> tuple[str, str]:
    choices = row["choices"]
    return f"{row['question']}\n{_options(choices['text'])}\nAnswer:", row["answerKey"]


def piqa(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['goal']}\nAnswer:", row["sol2" if int(row["label"]) else "sol1"]


def pubmedqa(row: dict[str, Any]) -> tuple[str, str]:
    return f"{' '.join(row['context']['contexts'])}\n{row['question']}\nAnswer:", row["final_decision"]


WORDING: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    task.__name__: task for task in (fingpt_sentiment, medmcqa, arc_easy, piqa, pubmedqa)
}


def load_examples(data: str, task: str, count: int) -> list[Example]:
    if task == "mixed":
        parts = [load_examples(data, name, count // len(WORDING) + 1) for name in WORDING]
        return [example for turn in zip(*parts, strict=False) for example in turn][:count]
    with (Path(data) / task / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, count)]
    worded = [WORDING[task](row) for row in rows]
    return [Example(str(i), prompt, f" {answer}") for i, (prompt, answer) in enumerate(worded)]


def load_samples(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Returns the training samples of one path: as many batches as there are steps."""
    from gradpruner.data.encoding import EncodedDataset, encode_all
    from gradpruner.training.batching import LengthGroups

    encoded = encode_all(tokenizer, load_examples(args.data, args.task, POOL), MAX_LENGTH)
    if args.path != "grouped":
        return encoded[: args.batch * args.steps]
    step = args.batch
    order = list(LengthGroups(encoded.lengths, step, SEED))
    starts = random.Random(SEED).sample(range(0, len(order) - step + 1, step), args.steps)
    return EncodedDataset([encoded.encoded[i] for start in starts for i in order[start : start + step]])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one path on one task, in this process."""
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed

    from gradpruner.common.progress import set_mode
    from gradpruner.data.encoding import Collator
    from gradpruner.training.finetuning import training_arguments
    from gradpruner.training.options import FinetuneOptions
    from gradpruner.training.trainer import CausalTrainer

    set_mode("quiet")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    samples, collator = load_samples(args, tokenizer), Collator(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").requires_grad_(True)
    settings = {"learning_rate": 1e-4, "batch_size": args.batch, "accumulation": 1, "epochs": 1}
    arguments = training_arguments(FinetuneOptions(**settings, seed=SEED, precision="fp32", device="cpu"))
    places = [0]

    def count(features: Any) -> Any:  # counts the plain Trainer's tokens, including padding
        batch = collator(features)
        places[0] += batch["input_ids"].numel()
        return batch

    set_seed(SEED)
    started, cpu_started = time.perf_counter(), time.process_time()
    if args.path == "plain":
        trainer: Any = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=count)
    else:
        batching = "packed" if args.path == "packed" else "padded"
        trainer = CausalTrainer(
            model=model, args=arguments, samples=samples, collator=collator, batching=batching
        )
        assert trainer.batching == batching, trainer.packing_fault
    if args.path == "grouped":
        trainer._get_train_sampler = lambda *_: SequentialSampler(samples)  # samples are grouped already
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    tokens = sum(samples.lengths)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / seconds,
        "padding_fraction": 1 - tokens / places[0] if args.path == "plain" else trainer.padding_fraction,
        "steps": trainer.state.global_step,
        "last_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
    }


def in_process(args: argparse.Namespace, task: str, path: str) -> dict[str, Any]:
    """Runs `measure` in its own process."""
    command = [sys.executable, __file__, "--model", args.model, "--data", args.data, "--task", task]
    command += ["--path", path, "--steps", str(args.steps), "--batch", str(args.batch)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{task} {path} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{task} {path}: {found['tokens_per_second']:.0f} real tokens/s", flush=True)
    return found


def compare(args: argparse.Namespace, task: str, paths: tuple[str, ...]) -> dict[str, Any]:
    """Measures all paths on one task, in turns."""
    runs: dict[str, list[dict[str, Any]]] = {path: [] for path in paths}
    for number in range(args.rounds):
        for path in paths if number % 2 == 0 else reversed(paths):
            runs[path].append(in_process(args, task, path))
    plain = runs["plain"]
    found: dict[str, Any] = {"steps": plain[0]["steps"], "paths": {}}
    for path, measured in runs.items():
        assert {run["steps"] for run in measured} == {found["steps"]}
        ratios = [
            run["tokens_per_second"] / p["tokens_per_second"] for p, run in zip(plain, measured, strict=True)
        ]
        same_order = path != "grouped"
        if same_order:
            assert abs(measured[0]["last_loss"] / plain[0]["last_loss"] - 1) < 1e-3, (task, path)
        found["paths"][path] = {
            "tokens": measured[0]["tokens"],
            "tokens_per_second": statistics.median(run["tokens_per_second"] for run in measured),
            "ratio_to_plain": statistics.median(ratios),
            "ratios": ratios,
            "padding_fraction": measured[0]["padding_fraction"],
            "last_loss": measured[0]["last_loss"],
            "seconds": [run["seconds"] for run in measured],
            "cpu_seconds": [run["cpu_seconds"] for run in measured],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", nargs="+", default=["fingpt_sentiment", "mixed"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", choices=[*WORDING, "mixed"], help=argparse.SUPPRESS)
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.path:
        print(json.dumps(measure(args)))
        return
    if args.quick:
        args.steps, args.rounds, args.batch = 2, 1, 8
    started = time.perf_counter()
    tasks = {}
    for number, task in enumerate(args.tasks):
        tasks[task] = compare(args, task, PATHS if number == 0 else ("plain", "packed"))
    result = {
        "what": "real tokens a second in full fine-tuning, and ratios to a plain transformers.Trainer",
        "config": {
            "model": Path(args.model).name,
            "batch_size": args.batch,
            "steps": args.steps,
            "rounds": args.rounds,
            "max_length": MAX_LENGTH,
            "grouped_among": POOL,
            "precision": "fp32",
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        },
        "goal": GOAL,
        "tasks": tasks,
        "seconds": time.perf_counter() - started,
        "load_average": os.getloadavg(),
        "provenance": provenance(SEED),
    }
    print(json.dumps({task: found["paths"] for task, found in tasks.items()}, indent=1))
    if not args.quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
