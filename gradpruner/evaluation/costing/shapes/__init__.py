"""Shapes of public models: a config.json without weights, to compute costs at real sizes.

To add a shape, add a folder with a config.json that holds only the architecture.
"""

from __future__ import annotations

import json
from pathlib import Path

SHAPES_DIR = Path(__file__).resolve().parent


def shape_names() -> list[str]:
    """Returns the names of all shapes, sorted."""
    return sorted(path.parent.name for path in SHAPES_DIR.glob("*/config.json"))


def shape_folder(name: str) -> Path | None:
    """Returns the folder of a shape, ignoring case; None if there is no such shape."""
    folder = SHAPES_DIR / name.lower()
    return folder if name.lower() in shape_names() else None


def describe_shape(name: str) -> str:
    """Returns a one-line description of a shape."""
    facts = json.loads((SHAPES_DIR / name / "config.json").read_text(encoding="utf-8"))
    return (
        f"{facts['num_hidden_layers']} layers, hidden {facts['hidden_size']}, "
        f"MLP {facts['intermediate_size']}, {facts['num_attention_heads']} heads / "
        f"{facts['num_key_value_heads']} KV heads, vocabulary {facts['vocab_size']}"
        + (", tied" if facts["tie_word_embeddings"] else "")
    )


__all__ = ["SHAPES_DIR", "describe_shape", "shape_folder", "shape_names"]
