"""Shapes of public models: their config.json without weights, for costs at real sizes.

Adding one = one folder with a config.json. Architecture facts only; nothing here can be loaded as a model.
"""

from __future__ import annotations

import json
from pathlib import Path

SHAPES_DIR = Path(__file__).resolve().parent


def shape_names() -> list[str]:
    """The names of all shapes, sorted."""
    return sorted(path.parent.name for path in SHAPES_DIR.glob("*/config.json"))


def shape_folder(name: str) -> Path | None:
    """The folder of a shape, None when there is none; upper and lower case are the same."""
    folder = SHAPES_DIR / name.lower()
    return folder if name.lower() in shape_names() else None


def describe_shape(name: str) -> str:
    """The facts of a shape in a few words."""
    facts = json.loads((SHAPES_DIR / name / "config.json").read_text(encoding="utf-8"))
    return (
        f"{facts['num_hidden_layers']} layers, hidden {facts['hidden_size']}, "
        f"MLP {facts['intermediate_size']}, {facts['num_attention_heads']} heads / "
        f"{facts['num_key_value_heads']} KV heads, vocabulary {facts['vocab_size']}"
        + (", tied" if facts["tie_word_embeddings"] else "")
    )


__all__ = ["SHAPES_DIR", "describe_shape", "shape_folder", "shape_names"]
