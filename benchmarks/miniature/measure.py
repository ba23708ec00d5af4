"""Measures whether the demo model and its task are a fair miniature, with plain torch and transformers.

`python benchmarks/miniature/measure.py` writes `measure.json`: accuracy before and after fine-tuning, the
loss without each layer, results without six of the sixteen layers before and after fine-tuning, and a small
sweep of learning rates. The measuring code deliberately uses nothing of the product, so that the product can
be checked against it. All figures are computed in fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pretrain import held_out_loss, text_sha256, unigram_loss
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gradpruner.common.provenance import provenance
from gradpruner.demo import DATA_DIR, DEMO_DIR, MODEL_DIR

EPOCHS, BATCH = 3, 16
FULL_LR, LORA_LR = 1e-3, 3e-3
LATE_MIDDLE = (8, 9, 10, 11, 12, 13)
"""Layers dropped in the figures of plain depth pruning: 6 of 16 (37.5 %)."""

Row = dict[str, Any]
Pair = tuple[list[int], list[int]]


def load_model(folder: Path = MODEL_DIR) -> Any:
    """Loads a checkpoint in fp32 and in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_rows(name: str) -> list[Row]:
    """Reads the rows of a split of the task, e.g. `train` or `test`."""
    text = (DATA_DIR / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[Pair]:
    """Encodes prompt and answer separately, with `</s>` after the answer, as the product does."""
    eos = tokenizer.convert_tokens_to_ids("</s>")
    return [
        (
            tokenizer(row["prompt"])["input_ids"],
            [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], eos],
        )
        for row in rows
    ]


def _batches(
    pairs: Sequence[Pair], order: Sequence[int], size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields right-padded (input_ids, attention_mask, labels); labels are -100 outside the answers."""
    for start in range(0, len(order), size):
        chosen = [pairs[index] for index in order[start : start + size]]
        width = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(chosen):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
            mask[row, :end] = 1
        yield ids, mask, labels


def _answer_logits(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logits at the positions that predict answer tokens, with their targets."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    where = labels[:, 1:] != -100
    return base.lm_head(hidden[:, :-1][where]), labels[:, 1:][where]


def finetune(
    model: Any,
    pairs: Sequence[Pair],
    learning_rate: float,
    *,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    seed: int = 0,
) -> dict[str, float]:
    """Fine-tunes in place: AdamW, weight decay 0.1, warm-up 3 %, linear decay, clipping at 1.0.

    Args:
        model: A causal LM, with or without PEFT adapters (with adapters, only these are trained).
        pairs: Rows from `encode_rows`.
        learning_rate: Peak learning rate.
        epochs: Passes over the rows.
        batch: Rows per step.
        seed: Seed of the order of the rows.

    Returns:
        `steps`, `seconds` and `loss` (mean over the last tenth of the steps).
    """
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
    )
    steps = epochs * -(-len(pairs) // batch)
    warmup = max(1, round(0.03 * steps))
    losses: list[float] = []
    started = time.perf_counter()
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for ids, mask, labels in _batches(pairs, order, batch):
            logits, targets = _answer_logits(model, ids, mask, labels)
            loss = nn.functional.cross_entropy(logits, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            done = len(losses)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((done + 1) / warmup, (steps - done) / (steps - warmup), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "loss": round(sum(tail) / len(tail), 4),
    }


@torch.no_grad()
def accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], batch: int = 32
) -> dict[str, float]:
    """Returns the accuracy, 0 to 1, on rows with one-word answers.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        rows: Rows of the task.
        batch: Rows per forward pass.

    Returns:
        `exact_match`: the greedy answer is the right word and then ends. Greedy decoding gives the right
        answer exactly if the argmax is right at every position of the answer, so nothing is generated.
        `choice`: the right one of `choices` is the most likely.
    """
    pairs = encode_rows(tokenizer, rows)
    exact = choice = 0
    for start in range(0, len(pairs), batch):
        index = range(start, min(start + batch, len(pairs)))
        logits, targets = _answer_logits(model, *next(_batches(pairs, index, len(index))))
        logits, targets = logits.view(len(index), 2, -1), targets.view(len(index), 2)
        exact += int((logits.argmax(-1) == targets).all(-1).sum())
        labels = tokenizer.convert_tokens_to_ids(rows[0]["choices"])
        best = logits[:, 0, labels].argmax(-1)
        choice += sum(
            rows[i]["choices"][int(b)] == rows[i]["completion"] for i, b in zip(index, best, strict=True)
        )
    return {"exact_match": round(exact / len(rows), 4), "choice": round(choice / len(rows), 4)}


def drop_layers(model: Any, layers: Sequence[int]) -> Any:
    """Removes decoder layers from a Llama model in place and returns it."""
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in set(layers)]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def with_lora(model: Any, seed: int = 0) -> Any:
    """Attaches LoRA (rank 8, alpha 32, no dropout) to all linears of the decoder layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=targets))


def measure(folder: Path, full_lrs: Sequence[float], lora_lrs: Sequence[float]) -> dict[str, Any]:
    """Measures all figures; takes some minutes.

    Args:
        folder: Model folder.
        full_lrs: Learning rates to try in full fine-tuning of the dense model.
        lora_lrs: Learning rates to try in LoRA fine-tuning of the dense model.

    Returns:
        The contents of `measure.json`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = load_rows("train"), load_rows("test")
    pairs = encode_rows(tokenizer, train)
    dense = load_model(folder)
    depth = dense.config.num_hidden_layers
    base_loss = held_out_loss(dense, tokenizer)
    result: dict[str, Any] = {
        "rows": {"train": len(train), "test": len(test)},
        "mean_tokens_per_row": round(sum(len(p) + len(a) for p, a in pairs) / len(pairs), 1),
        "majority_class": _majority(test),
        "held_out_loss": {
            "dense": round(base_loss, 4),
            "unigram": round(unigram_loss(tokenizer), 4),
        },
        "zero_shot": accuracy(dense, tokenizer, test),
    }
    rises = [held_out_loss(drop_layers(load_model(folder), [j]), tokenizer, 32) for j in range(depth)]
    reference = held_out_loss(dense, tokenizer, 32)
    result["single_layer_loss_increase"] = [round(loss - reference, 4) for loss in rises]
    least = tuple(sorted(sorted(range(depth), key=lambda j: rises[j])[:6]))
    print(json.dumps(result), flush=True)

    def tuned(model: Any, learning_rate: float) -> dict[str, Any]:
        info = finetune(model, pairs, learning_rate)
        info = {"learning_rate": learning_rate, **info, **accuracy(model, tokenizer, test)}
        print(info, flush=True)
        return info

    result["dropped"] = {}
    for name, layers in (
        ("late_middle", LATE_MIDDLE),
        ("least_loss_increase", least),
    ):
        model = drop_layers(load_model(folder), layers)
        before = {
            "layers": list(layers),
            "held_out_loss": round(held_out_loss(model, tokenizer), 4),
        }
        result["dropped"][name] = {**before, "finetuned": tuned(model, FULL_LR)}
    result["full_finetuning"] = [tuned(load_model(folder), rate) for rate in full_lrs]
    result["lora_finetuning"] = [tuned(with_lora(load_model(folder)), rate) for rate in lora_lrs]
    result["setting"] = {
        "epochs": EPOCHS,
        "batch": BATCH,
        "weight_decay": 0.1,
        "warmup": 0.03,
        "threads": torch.get_num_threads(),
    }
    result["text_sha256"] = text_sha256()
    result["provenance"] = provenance(0)
    return result


def _majority(rows: Sequence[Row]) -> float:
    answers = [row["completion"] for row in rows]
    return round(max(answers.count(answer) for answer in set(answers)) / len(answers), 4)


def main() -> None:
    """Runs the measurement from the command line."""
    parser = argparse.ArgumentParser(description="Measure the embedded demo model and task.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full-lr", type=float, nargs="*", default=[5e-4, 1e-3])
    parser.add_argument("--lora-lr", type=float, nargs="*", default=[3e-3, 1e-2])
    parser.add_argument("--out", type=Path, default=DEMO_DIR / "measure.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.model, options.full_lr, options.lora_lr)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
