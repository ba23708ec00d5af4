"""The parts of the GPU benchmark in order of importance: what each is, needs, and about how long it takes.

This module imports only the standard library, so that the planner holds no GPU memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COUNTING = ("transformers",)
TRAINING = ("transformers", "pydantic", "peft", "accelerate")
SHAPES = ("llama-3.1-8b", "mistral-7b-v0.3")
MODES = ("lora", "inference", "full")


@dataclass(frozen=True)
class Part:
    """One measurement, which runs in its own process.

    Attributes:
        name: Name in the journal.
        what: Description for tables and messages.
        function: Module of this folder and function: "pairs:table".
        needs: Required packages besides torch.
        seconds: About how long it takes on an H100 in all; an estimate until it has been measured.
        options: Arguments for the function.
        on: Required command line options: "model", "data".
        tiny: Whether it runs with a tiny model on a CPU.
    """

    name: str
    what: str
    function: str
    needs: tuple[str, ...] = ()
    seconds: float = 60.0
    options: tuple[tuple[str, Any], ...] = ()
    on: tuple[str, ...] = ()
    tiny: bool = True


def _table(shape: str) -> list[Part]:
    return [
        Part(
            f"table/{shape}/{mode}",
            f"{shape}, {mode}, dense and pruned in turns",
            "pairs:table",
            COUNTING if mode == "inference" else TRAINING,
            options=(("shape", shape), ("mode", mode)),
        )
        for mode in MODES
    ]


PARTS = (
    Part("device", "how fast the device copies and multiplies", "linears:device_rates", seconds=20),
    *_table(SHAPES[0]),
    Part("job", "an 8 B shape recorded, scored, repaired, merged and cut", "whole:job", TRAINING),
    Part("recording", "a LoRA step recorded, against one that is not", "pairs:recording", TRAINING),
    Part("linears", "scoring, merging and repair of one linear", "linears:linears", seconds=70),
    Part("batching", "packed against padded samples", "pairs:batching", TRAINING),
    *_table(SHAPES[1]),
    Part("liger", "Liger's kernels", "pairs:liger", (*TRAINING, "liger_kernel"), tiny=False),
    Part(
        "flash_attention",
        "FlashAttention 2",
        "pairs:flash_attention",
        (*TRAINING, "flash_attn"),
        tiny=False,
    ),
    Part("serving", "vLLM's answers", "whole:serving", (*COUNTING, "vllm"), seconds=100),
    Part("quality", "the quality study", "whole:quality", TRAINING, seconds=120, on=("model", "data")),
)
