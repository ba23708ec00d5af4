"""Pre-trains the embedded model on the text of the invented town.

`python benchmarks/miniature/pretrain.py` writes `model/` (checkpoint and tokenizer) and `pretrain.json`
(loss curve and provenance). The text is generated during training and never repeats.

Two choices rest on measurements:
- fp32 on one thread: without AVX-512 BF16 or AMX, bf16 matrix products are emulated and about 20 times
  slower, and matrices this small gain nothing from threads.
- AdamW, with wide embeddings and output projections scaled down by depth: with Muon at 0.02 and transformers'
  default initialisation, a five times larger model reached a higher loss and left 14 of its 16 layers idle.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import corpus, make_rows

from gradpruner.common.progress import Progress
from gradpruner.common.provenance import provenance
from gradpruner.demo import DEMO_DIR, MODEL_DIR

CONTEXT = 128
"""Tokens per training sequence and the model's context length."""
SEQUENCES = 8
"""Sequences per step."""
HELD_OUT_SEED = 10_000
"""Corpus seed of the held-out text; training uses seed 1."""
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.05, 30
EMBEDDING_STD = 0.5


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the word-level tokenizer, with one id per word of the town's text and of the task.

    Returns:
        A tokenizer that lower-cases, splits on white space, puts `<s>` first and decodes with single spaces.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    stories = corpus(HELD_OUT_SEED)
    words = {word for _ in range(5_000) for word in next(stories).split()}
    words.update(word for rows in make_rows() for row in rows for word in str(row["prompt"]).split())
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", model_max_length=CONTEXT, padding_side="right",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Builds the untrained model: 16 layers, hidden size 48, fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=128, num_hidden_layers=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0, EMBEDDING_STD)
            elif weight.ndim == 2:
                weight.normal_(0, 0.7 / math.sqrt(weight.shape[1]))
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def packed(tokenizer: PreTrainedTokenizerFast, seed: int, sequences: int) -> Iterator[Tensor]:
    """Packs documents, each between `<s>` and `</s>`, into blocks.

    Args:
        tokenizer: The tokenizer from `build_tokenizer`.
        seed: Corpus seed.
        sequences: Rows per block.

    Yields:
        int64 tensors of shape (sequences, CONTEXT), endlessly.
    """
    vocabulary = tokenizer.get_vocab()
    unknown, bos, eos = vocabulary["<unk>"], vocabulary["<s>"], vocabulary["</s>"]
    stream: list[int] = []
    size = sequences * CONTEXT
    for document in corpus(seed):
        stream.append(bos)
        stream.extend(vocabulary.get(word, unknown) for word in document.split())
        stream.append(eos)
        if len(stream) >= size:
            yield torch.tensor(stream[:size]).view(sequences, CONTEXT)
            stream = stream[size:]


@torch.no_grad()
def held_out_loss(model: nn.Module, tokenizer: PreTrainedTokenizerFast, sequences: int = 64) -> float:
    """Returns the mean next-token loss (nats) on `sequences` x 128 held-out tokens."""
    blocks = packed(tokenizer, HELD_OUT_SEED, 16)
    losses = []
    for _ in range(max(1, sequences // 16)):
        block = next(blocks)
        losses.append(float(model(input_ids=block, labels=block, use_cache=False).loss))
    return sum(losses) / len(losses)


def train(steps: int, seed: int, out: Path) -> None:
    """Trains for `steps` steps, with a learning rate that decays linearly, and writes the result to `out`."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    curve: list[dict[str, float]] = []
    started = time.perf_counter()
    with Progress(steps, "pre-train") as progress:
        for step, block in enumerate(packed(tokenizer, 1, SEQUENCES), start=1):
            loss = model(input_ids=block, labels=block, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(step / WARMUP_STEPS, (steps - step) / steps + 0.01)
            optimizer.step()
            optimizer.zero_grad()
            value = round(float(loss.detach()), 4)
            progress.update(step, loss=value)
            if step % 20 == 0 or step == 1:
                curve.append({"step": step, "tokens": step * SEQUENCES * CONTEXT, "loss": value})
            if step == steps:
                break
    _save(model, tokenizer, curve, time.perf_counter() - started, seed, out)


def text_sha256() -> str:
    """Returns a digest of 1,000 documents, training and test rows: the text behind the figures."""
    stories = corpus(1)
    text = "\n".join([*(next(stories) for _ in range(1000)), json.dumps(make_rows()[:2])])
    return hashlib.sha256(text.encode()).hexdigest()


def _save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    curve: list[dict[str, float]],
    seconds: float,
    seed: int,
    out: Path,
) -> None:
    model.eval()
    model.to(torch.bfloat16)
    folder = out / MODEL_DIR.name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    model.float()  # the loss is computed in fp32, from the weights as stored: rounded to bf16
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": {"adamw_lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "schedule": "linear to 0"},
        "context": CONTEXT,
        "steps": int(curve[-1]["step"]),
        "tokens": int(curve[-1]["tokens"]),
        "seconds": round(seconds, 1),
        "held_out_loss": round(held_out_loss(model, tokenizer), 4),
        "unigram_loss": round(unigram_loss(tokenizer), 4),
        "text_sha256": text_sha256(),
        "provenance": provenance(seed),
        "curve": curve,
    }
    (out / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"held-out loss {record['held_out_loss']} (unigram {record['unigram_loss']}), {seconds:.0f} s")


def unigram_loss(tokenizer: PreTrainedTokenizerFast) -> float:
    """Returns the loss (nats per token) of the best model that ignores context: the held-out word entropy."""
    blocks = packed(tokenizer, HELD_OUT_SEED, 16)
    counts = torch.zeros(len(tokenizer))
    for _ in range(4):
        counts += torch.bincount(next(blocks).flatten(), minlength=len(tokenizer))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def main() -> None:
    """Runs the pre-training from the command line."""
    parser = argparse.ArgumentParser(description="Pre-train the embedded demo model.")
    parser.add_argument("--steps", type=int, default=800, help="steps of 1,024 tokens, default 800")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEMO_DIR, help="receives model/ and pretrain.json")
    options = parser.parse_args()
    train(options.steps, options.seed, options.out)


if __name__ == "__main__":
    main()
