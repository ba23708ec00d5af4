"""The embedded demo: a small pre-trained model and a task about the same invented town.

With it, the whole method runs offline on a CPU in minutes. Model and data are original. The scripts in
`benchmarks/miniature/` made them: `world` invents the town and writes its text and the task, `pretrain`
trains the model on that text, and `measure` checks that the pair is a fair miniature of pruning a large model
for your own task.
"""

from __future__ import annotations

from pathlib import Path

DEMO_DIR = Path(__file__).resolve().parent
MODEL_DIR = DEMO_DIR / "model"
"""The pre-trained model and its tokenizer, in the standard checkpoint layout."""
DATA_DIR = DEMO_DIR / "data"
"""`train.jsonl`, `test.jsonl` and `validation.jsonl` of the task."""

__all__ = ["DATA_DIR", "DEMO_DIR", "MODEL_DIR"]
