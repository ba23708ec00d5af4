"""Peak memory and time of each method's choice of layers, compared with a plain LoRA training.

    python benchmarks/methods_memory.py                          a Llama of 107 M parameters, random weights
    python benchmarks/methods_memory.py --model llama-3.1-8b     a public shape, for a GPU
    python benchmarks/methods_memory.py --model DIR --rows F     a folder, and rows of prompts and answers
    python benchmarks/methods_memory.py --quick                  a trial; its figures are noise

Writes benchmarks/results/methods_memory.json, or `--out`. Measured are, each in its own processes:

    lora                  some steps of LoRA fine-tuning (`finetune`) without recording
    evidence              `record_gradients` with the same number of steps and samples, factors to disk
    METHOD                the scores or plan of a method that removes `--share` of the layers; methods that
                          need recorded gradients read those of `evidence`
    whole gradients       the backward pass of LLM-Pruner's samples, which holds the gradient of every weight
    whole gradients, mix  the same with the squared gradients beside it: the second order as released

Peak memory includes the model. On CUDA it is the most bytes torch had allocated; on a CPU it is the resident
set size (RSS) minus the RSS before the model was loaded. Everything runs once with a tiny model first, so
that libraries are already loaded by then. Time includes loading the model. All rows are measured in every
round, so that changes of the machine affect all of them; figures are medians over rounds. The goal is checked
with the peak of `evidence` over that of `lora`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import psutil
import torch
from small_llama import config_of, random_samples
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gradpruner.common.memory import PeakMemory
from gradpruner.common.progress import set_mode
from gradpruner.common.provenance import provenance
from gradpruner.data.encoding import Collator, encode_all
from gradpruner.data.loading import load_examples
from gradpruner.evaluation.costing.subject import Subject, find_subject
from gradpruner.evaluation.costing.turns import worker_environment
from gradpruner.evaluation.costing.worker import build
from gradpruner.evaluation.costing.workload import Workload
from gradpruner.gradients.scores import default_num_prune
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, MethodContext
from gradpruner.models.loading import load_tokenizer, resolve_device, resolve_dtype
from gradpruner.models.sizes import ModelSizes, build_on_meta, count_parameters
from gradpruner.training.finetuning import finetune
from gradpruner.training.recording import record_gradients

RESULT = Path(__file__).parent / "results" / "methods_memory.json"
SEED, GOAL = 0, 1.05
# Hidden size, MLP channels, layers, query heads, KV heads, vocabulary.
MEDIUM, SMALL = (1024, 2816, 8, 16, 4, 8192), (64, 128, 4, 4, 2, 256)
# Rows in addition to each method with its default options.
VARIANTS = (("llm_pruner", {"taylor": "param_second"}), ("llm_pruner", {"taylor": "param_mix"}))
CONTRASTS = ("whole gradients", "whole gradients, mix")
Samples = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Order:
    """What one process measures.

    Attributes:
        what: "lora", "evidence", a method, or one of `CONTRASTS`.
        config: The model's config.
        folder: Folder with the weights; None for random weights.
        layers: Number of parameters of each layer.
        samples: The training samples.
        trace: Folder of the recorded gradients.
        options: The method's options that differ from the defaults.
        steps: Optimizer steps of "lora" and "evidence".
        batch_size: Samples per step.
        share: Share of the layers to remove.
        device: "auto" or a torch device.
        dtype: Dtype of the weights, or "auto".
    """

    what: str
    config: dict[str, Any]
    folder: str | None
    layers: list[int]
    samples: Samples
    trace: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 40
    batch_size: int = 4
    share: float = 0.4
    device: str = "auto"
    dtype: str = "auto"

    def load(self) -> Any:
        """Returns the model on the device, in eval mode."""
        torch.manual_seed(SEED)
        config = CONFIG_MAPPING[self.config["model_type"]].from_dict(self.config)
        subject = Subject("", config, Path(self.folder) if self.folder else None)
        workload = Workload(device=self.device, dtype=self.dtype)
        return build(subject, "lora", workload, resolve_device(self.device))

    def training(self) -> dict[str, Any]:
        """Returns the options that `finetune` and `record_gradients` share."""
        on_cpu = resolve_device(self.device).type == "cpu"
        return {
            "learning_rate": 1e-4,
            "batch_size": self.batch_size,
            "collator": Collator(),
            "seed": SEED,
            "device": "cpu" if on_cpu else "auto",
        }


# --- in the child process -----------------------------------------------------------------------------------


def run_lora(order: Order) -> None:
    options = {"mode": "lora", "accumulation": 1, "max_steps": order.steps, "merge_adapter": False}
    # Padded batches, as in recording.
    finetune(order.load(), order.samples, batching="padded", **options, **order.training())


def run_evidence(order: Order) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Keep the first recording for the methods; later rounds write to a temporary folder.
        where = Path(folder) / "trace" if Path(order.trace).exists() else Path(order.trace)
        record_gradients(order.load(), order.samples, steps=order.steps, folder=where, **order.training())


def run_method(order: Order) -> None:
    method, num_layers = METHODS.find(order.what), len(order.layers)
    num_prune = default_num_prune(num_layers, order.share)
    decide: Any = method.score or method.plan
    decide(
        MethodContext(
            num_layers=num_layers,
            seed=SEED,
            trace=lambda: GradientTrace.load(order.trace),
            model=order.load,
            samples=order.samples,
            collator=Collator(),
            num_keep=num_layers - num_prune,
            num_remove=num_prune * max(order.layers),
            protected=(0,),
            options=method.read_options(order.what, order.options),
        )
    )


def run_whole_gradients(order: Order) -> None:
    """Holds a gradient, and for the second order its square, per weight, as LLM-Pruner's code does."""
    model = order.load().requires_grad_(True)
    ids = [sample["input_ids"][:64] for sample in order.samples[:10]]
    samples = [{"input_ids": one, "labels": one} for one in ids]
    squares: list[torch.Tensor] = []

    def backward(some: Samples) -> None:
        model.zero_grad()
        batch = Collator()(some)
        model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False).loss.backward()

    for sample in samples if order.what == "whole gradients, mix" else []:
        backward([sample])
        grads = [p.grad for p in model.parameters()]
        squares = squares or [torch.zeros_like(grad) for grad in grads]
        for square, grad in zip(squares, grads, strict=True):
            square.addcmul_(grad, grad, value=1 / len(samples))
    backward(samples)


def run(order: Order) -> None:
    runs: dict[str, Callable[[Order], None]] = {"lora": run_lora, "evidence": run_evidence}
    runs |= dict.fromkeys(CONTRASTS, run_whole_gradients)
    runs.get(order.what, run_method)(order)
    gc.collect()


def work(order: Order) -> dict[str, Any]:
    """Carries out an order; must be called in a fresh process."""
    set_mode("quiet")
    device = resolve_device(order.device)
    with tempfile.TemporaryDirectory() as folder:
        small = small_order(order, Path(folder))
        if order.what in METHODS.names() and METHODS.find(order.what).needs_trace:
            run(replace(small, what="evidence"))
        run(small)
    empty = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    started = time.perf_counter()
    with PeakMemory(device) as memory:
        run(order)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return {
        "peak_bytes": memory.peak_bytes - empty,
        "seconds": time.perf_counter() - started,
        "kind": memory.kind,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(resolve_dtype(order.dtype, device)).removeprefix("torch."),
    }


# --- in the parent process ----------------------------------------------------------------------------------


def small_order(order: Order, folder: Path) -> Order:
    """Returns the same order for a tiny model."""
    made = order_for(
        Subject("miniature", config_of(SMALL)), random_samples(256, 16, 24), str(folder / "trace")
    )
    return replace(
        made, what=order.what, options=order.options, steps=4, device=order.device, dtype=order.dtype
    )


def order_for(subject: Subject, samples: Samples, trace: str, **options: Any) -> Order:
    return Order(
        what="",
        config=json.loads(subject.config.to_json_string(use_diff=False)),
        folder=str(subject.folder) if subject.folder else None,
        layers=ModelSizes(subject.config).layer_parameters,
        samples=samples,
        trace=trace,
        **options,
    )


def samples_of(rows: str, subject: Subject, count: int, tokens: int) -> Samples:
    if subject.folder is None:
        raise SystemExit("--rows needs a model folder, whose tokenizer encodes them.")
    examples = load_examples(rows, limit=count, seed=SEED).examples
    return list(encode_all(load_tokenizer(subject.folder), examples, tokens))


def ask(order: Order) -> dict[str, Any]:
    """Carries out an order in its own process; returns {"error": ...} if the process failed."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker"],
        input=json.dumps(asdict(order)),
        capture_output=True,
        text=True,
        env=worker_environment(order.device),
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1] if lines else f"the process ended with code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def rows_to_measure(methods: list[str] | None) -> list[tuple[str, dict[str, Any]]]:
    deciding = [name for name in METHODS.names() if METHODS.find(name).score or METHODS.find(name).plan]
    chosen = [name for name in deciding if methods is None or name in methods]
    variants = [(name, options) for name, options in VARIANTS if name in chosen]
    fixed: list[tuple[str, dict[str, Any]]] = [("lora", {}), ("evidence", {})]
    return [*fixed, *((name, {}) for name in chosen), *variants, *((name, {}) for name in CONTRASTS)]


def measure(order: Order, rows: list[tuple[str, dict[str, Any]]], rounds: int) -> list[dict[str, Any]]:
    answers: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(rows))}
    for round_ in range(rounds):
        for i, (what, options) in enumerate(rows):
            answers[i].append(ask(replace(order, what=what, options=options)))
            print(f"round {round_ + 1}: {what} {options or ''}", file=sys.stderr, flush=True)
    return [{"what": w, "options": o, **summary(answers[i])} for i, (w, o) in enumerate(rows)]


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [answer["error"] for answer in answers if "error" in answer]
    if errors:
        return {"error": errors[0]}
    peaks, seconds = ([answer[key] for answer in answers] for key in ("peak_bytes", "seconds"))
    return {
        "peak_bytes": round(statistics.median(peaks)),
        "peak_bytes_values": peaks,
        "seconds": round(statistics.median(seconds), 3),
        "seconds_values": [round(value, 3) for value in seconds],
        **{key: answers[0][key] for key in ("kind", "device", "dtype")},
    }


def add_ratios(found: list[dict[str, Any]]) -> bool | None:
    """Adds ratios to the first row, "lora"; returns whether "evidence" meets the goal, None if one failed."""
    base = found[0].get("peak_bytes")
    for row in found:
        if base and "peak_bytes" in row:
            row["peak_over_lora"] = round(row["peak_bytes"] / base, 4)
            row["seconds_over_lora"] = round(row["seconds"] / found[0]["seconds"], 4)
    ratio = found[1].get("peak_over_lora")
    return None if ratio is None else ratio <= GOAL


def show(result: dict[str, Any]) -> None:
    print(f"{'':45} peak memory   over lora     seconds   over lora")
    for row in result["rows"]:
        name = " ".join([row["what"], *(f"{k}={v}" for k, v in row["options"].items())])
        if "error" in row:
            print(f"{name:45} {row['error']}")
            continue
        print(
            f"{name:45} {row['peak_bytes'] / 1e6:8.1f} MB {row['peak_over_lora']:10.3f}x"
            f" {row['seconds']:11.2f} {row['seconds_over_lora']:10.3f}x"
        )
    print(f"goal: evidence <= {GOAL}x the peak of lora; met: {result['met']}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder, hub id or public shape")
    parser.add_argument("--rows", help="training rows with prompts and answers; default: random tokens")
    parser.add_argument("--methods", help="methods, separated by commas; default: all that score or plan")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per sample; with --rows at most")
    parser.add_argument("--share", type=float, default=0.4, help="share of the layers to remove")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="a trial with a tiny model; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # output of libraries must not mix with the answer
        print(json.dumps(work(Order(**json.loads(sys.stdin.read())))), file=answers, flush=True)
        return
    if args.quick:
        args.steps, args.tokens, args.rounds = 4, 32, 1
    made = Subject("llama", config_of(SMALL if args.quick else MEDIUM))
    subject = find_subject(args.model) if args.model else made
    count = args.steps * args.batch_size
    samples = (
        samples_of(args.rows, subject, count, args.tokens)
        if args.rows
        else random_samples(count, args.tokens, int(subject.config.vocab_size))
    )
    load_before = os.getloadavg()
    settings = {key: getattr(args, key) for key in ("steps", "batch_size", "share", "device", "dtype")}
    with tempfile.TemporaryDirectory() as folder:
        order = order_for(subject, samples, str(Path(folder) / "trace"), **settings)
        methods = args.methods.split(",") if args.methods else None
        found = measure(order, rows_to_measure(methods), args.rounds)
    result = {
        "what": "peak memory and time of each method's decision, and of a plain LoRA training of some steps",
        "config": {
            "model": subject.name,
            "weights": "loaded" if subject.folder else "random",
            "parameters": count_parameters(build_on_meta(subject.config)),
            "layers": subject.depth,
            "samples": len(samples),
            "tokens": args.tokens,
            "rounds": args.rounds,
            "data": "rows" if args.rows else "random tokens",
            "threads": torch.get_num_threads(),
            **settings,
        },
        "goal": {"evidence_peak_over_lora_at_most": GOAL},
        "met": add_ratios(found),
        "rows": found,
        "provenance": provenance(SEED),
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }
    show(result)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
