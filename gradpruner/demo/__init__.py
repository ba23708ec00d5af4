"""The embedded default: a small model, really pre-trained, and a task from the same world.

It lets the whole method run offline in minutes on a CPU. Everything here is original, made by the scripts in
`benchmarks/miniature/`: `world` invents the town and writes both its text and the task, `pretrain` trains the
model on that text, and `measure` checks by figures that the pair is a fair miniature of pruning a large model
for a task of one's own.
"""

from __future__ import annotations

from pathlib import Path

DEMO_DIR = Path(__file__).resolve().parent
MODEL_DIR = DEMO_DIR / "model"
"""The pre-trained model and its tokenizer, in the standard checkpoint layout."""
DATA_DIR = DEMO_DIR / "data"
"""`train.jsonl`, `test.jsonl` and `validation.jsonl` of the task."""

__all__ = ["DATA_DIR", "DEMO_DIR", "MODEL_DIR"]
