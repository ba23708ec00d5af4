"""What the cells of the quality study share: models on disk, training, evaluation, a journal of results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks import TASKS, splits

from gradpruner.models.kernels import with_fast_products

BATCH = 16


@dataclass
class Work:
    """One task and seed, with its rows, models and results.

    Attributes:
        model: Folder of the pre-trained model.
        data: Folder of the data sets.
        scratch: Folder that keeps tuned models between cells.
        results: Folder of the journals of results.
        task: A name in `tasks.TASKS`.
        seed: Seed of training rows, data order and recording.
        only: Measure only cells whose name contains one of these texts; all if empty.
        device: "cpu", or "auto" for a GPU if there is one.
        rows: Split ("train", "validation", "test") -> examples.
    """

    model: Path
    data: Path
    scratch: Path
    results: Path
    task: str
    seed: int
    only: tuple[str, ...] = ()
    device: str = "cpu"
    rows: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        from gradpruner.data.encoding import Collator, encode_all
        from gradpruner.models.loading import load_tokenizer

        self.rows = splits(self.data, self.task, self.seed)
        self.tokenizer = load_tokenizer(self.model)
        self.collator = Collator(self.tokenizer)
        self.encoded = {
            name: encode_all(self.tokenizer, rows, self.facts.max_length) for name, rows in self.rows.items()
        }

    @property
    def facts(self) -> Any:
        return TASKS[self.task]

    def wants(self, cell: str) -> bool:
        return not self.only or any(text in cell for text in self.only)

    def of_seed(self, seed: int) -> Work:
        """Returns the same task with another seed."""
        if seed == self.seed:
            return self
        return replace(self, seed=seed)

    def folder(self, name: str) -> Path:
        """Returns the folder of a tuned dense model, called after its learning rate or how it was tuned."""
        return self.scratch / f"{self.task}-{self.seed}-{name}"

    @cached_property
    def num_layers(self) -> int:
        from gradpruner.models.loading import load_config

        return int(load_config(self.model).num_hidden_layers)

    @property
    def journal(self) -> Path:
        return self.results / f"{self.task}.jsonl"

    @cached_property
    def provenance(self) -> dict[str, Any]:
        from gradpruner.common.provenance import provenance

        found = provenance(self.seed)
        return {key: found[key] for key in ("commit", "dirty", "packages", "machine")}

    def done(self) -> dict[str, dict[str, Any]]:
        """Returns the results so far, by key."""
        if not self.journal.exists():
            return {}
        lines = self.journal.read_text(encoding="utf-8").splitlines()
        return {entry["key"]: entry for entry in map(json.loads, lines)}

    def cell(self, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result of a cell from the journal, or measures it and adds it there."""
        key = f"{self.task}/{self.seed}/{what}"
        found = self.done().get(key)
        if found is None:
            started = time.perf_counter()
            found = {"key": key, "task": self.task, "seed": self.seed, "cell": what, **work()}
            found["cell_seconds"] = round(time.perf_counter() - started, 1)
            found["provenance"] = self.provenance
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            shown = {k: v for k, v in found.items() if k in ("test", "validation", "seconds", "cell_seconds")}
            print(key, {k: _brief(v) for k, v in shown.items()}, flush=True)
        return found

    def load(self, folder: Path | None = None) -> Any:
        from gradpruner.models.loading import load_model

        return load_model(folder or self.model, dtype="float32", device=self.device)

    def tune(self, model: Any, rate: float, **options: Any) -> dict[str, Any]:
        """Fully fine-tunes a model in place; returns seconds, tokens and the mean of the last losses."""
        return self.tuned(model, rate, **options)[1]

    def part(self, start: float, stop: float) -> Any:
        """Returns the training rows between two fractions, e.g. 0 to 0.25 for the first quarter."""
        encoded = self.encoded["train"]
        return encoded[round(start * len(encoded)) : round(stop * len(encoded))]

    def tuned(
        self, model: Any, rate: float, rows: Any = None, passes: float = 1, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Fine-tunes a model; returns it (with LoRA a new object) and figures of the training.

        `passes` multiplies the task's epochs.
        """
        from gradpruner.training.finetuning import finetune

        epochs = passes * self.facts.epochs
        settings = {"mode": "full", "epochs": epochs, "batch_size": BATCH, "accumulation": 1}
        trained, result = finetune(
            model,
            rows or self.encoded["train"],
            collator=self.collator,
            learning_rate=rate,
            seed=self.seed,
            device=self.device,
            precision="fp32",
            weight_decay=0.01,
            warmup_ratio=0.05,
            description=f"{self.task} {self.seed}",
            **(settings | options),
        )
        trained.eval()
        tail = [entry["loss"] for entry in result.losses[-10:]]
        return trained, {
            "rate": rate,
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 1),
            "final_loss": sum(tail) / len(tail),
        }

    def measure(self, model: Any, *names: str) -> dict[str, Any]:
        """Returns the score, its values per row and the mean negative log-likelihood, by split.

        A score that needs generated answers is measured on test rows only, because all choices on validation
        rows are made by likelihood. So these also keep the loss of every row, in nats.
        """
        found: dict[str, Any] = {}
        for name in names or ("validation", "test"):
            scores, losses, tokens = answered(model, self.encoded[name], self.collator)
            found[name] = {"nll": sum(losses) / tokens}
            if name == "validation":
                found[name]["losses"] = [round(loss, 4) for loss in losses]
            if self.facts.metric != "exact_match":
                if name != "test":
                    continue
                scores = self.written(model, name)
            found[name] |= {"score": sum(scores) / len(scores), "rows": pack(scores)}
        return found

    def written(self, model: Any, name: str) -> list[float]:
        """Returns the metric of the greedy answers, row by row."""
        from gradpruner.evaluation.outputs import values_of
        from gradpruner.evaluation.quality import evaluate

        result = evaluate(
            model,
            self.tokenizer,
            self.rows[name],
            metrics=(self.facts.metric,),
            batch_size=64,
            max_length=self.facts.max_length,
            progress="",
        )
        return [float(value) for value in values_of(result.outputs)[self.facts.metric]]


@with_fast_products
def answered(model: Any, samples: Any, collator: Any, size: int = 64) -> tuple[list[float], list[float], int]:
    """Returns whether each row's greedy answer is right, its loss in nats, and the number of answer tokens.

    The greedy answer, with its end token, is right exactly if every token of the right answer is the most
    likely one after the tokens before it. So nothing has to be generated.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from gradpruner.data.encoding import IGNORED
    from gradpruner.training.trainer import answer_window

    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    right, losses, count = [0.0] * len(order), [0.0] * len(order), 0
    device = next(model.parameters()).device
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = {name: rows.to(device) for name, rows in collator([samples[i] for i in chosen]).items()}
        window = answer_window(batch["labels"])
        targets = window["labels"][:, 1:]
        with torch.inference_mode():
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                logits_to_keep=window["logits_to_keep"],
                use_cache=False,
            ).logits[:, :-1]
            learned = targets != IGNORED
            nll = cross_entropy(logits[learned].float(), targets[learned], reduction="none").double()
            sums = torch.zeros(len(chosen), dtype=torch.float64, device=device)
            sums.index_add_(0, learned.nonzero()[:, 0], nll)
            count += len(nll)
            same = ((logits.argmax(-1) == targets) | ~learned).all(dim=1)
        for i, hit, loss in zip(chosen, same.tolist(), sums.tolist(), strict=True):
            right[i], losses[i] = float(hit), loss
    return right, losses, count


def pack(scores: list[float]) -> Any:
    """Returns row scores in a short form: a string of 0 and 1 if there are no other values."""
    if all(score in (0.0, 1.0) for score in scores):
        return "".join(str(int(score)) for score in scores)
    return [round(score, 4) for score in scores]


def _brief(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: round(v, 4) for k, v in value.items() if k in ("score", "nll")}
    return value


def with_plain_memory() -> None:
    """Restarts the process so that it keeps freed memory instead of returning it: 1.4 times as fast."""
    import sys

    wanted = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
