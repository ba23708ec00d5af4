"""The parts of the GPU benchmark in order of value: what each needs, about how long it takes, and what it is.

Importing this module imports nothing but the standard library: the planner holds no memory of the device.
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
    """One measurement, made in a process of its own.

    Attributes:
        name: As in the journal.
        what: What it is, for tables and messages.
        function: Module of this folder and function: "pairs:table".
        needs: Packages it cannot do without, beside torch.
        seconds: About how long it takes on an H100, everything included; a guess until one was measured.
        options: Handed to the function.
        on: What must have been given: "model", "data".
        tiny: Whether a miniature of it runs on a CPU.
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
