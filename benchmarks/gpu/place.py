"""Where parts are measured: the device, and the sizes of models and inputs, real or tiny."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

SEED = 0


@dataclass(frozen=True)
class Place:
    """The settings that all parts share.

    Attributes:
        device: A torch device, e.g. "cuda" or "cpu".
        tiny: Use tiny sizes, which show that everything runs but give no useful figures.
        journal: File of the results; further results are stored beside it.
        model: Folder of a pre-trained model for the quality study and for serving; None for none.
        data: Folder of the data sets for the quality study.
    """

    device: str
    tiny: bool
    journal: Path
    model: Path | None = None
    data: Path | None = None

    @cached_property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def scratch(self) -> Path:
        """Folder that keeps tuned models between two calls on one machine."""
        return Path(tempfile.gettempdir()) / f"gradpruner-gpu-{'tiny' if self.tiny else 'real'}"

    @property
    def num_prune(self) -> int:
        """Number of pruned layers: 13 of 32, as in the paper."""
        return 2 if self.tiny else 13

    @property
    def linear(self) -> tuple[int, int]:
        """Rows and columns of the linear before a cut in an 8 B model: down_proj."""
        return (48, 96) if self.tiny else (4096, 14336)

    def subject(self, shape: str) -> Any:
        """Returns a model of one of the package's shapes, with random weights."""
        from gradpruner.evaluation.costing.subject import Subject, find_subject

        found = find_subject(shape)
        if not self.tiny:
            return found
        small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
        small |= dict.fromkeys(("bos_token_id", "eos_token_id"))
        return Subject(found.name, type(found.config)(**{**found.config.to_dict(), **small}))

    def workload(self, mode: str, **changes: Any) -> Any:
        """Returns the workload of a mode: short answers as in the paper's tasks; bfloat16 weights on a GPU.

        Float32 would not fit: full fine-tuning of 8 B parameters takes 64 GB in bfloat16 already, and the
        pruned model is in memory too.
        """
        from gradpruner.evaluation.costing.workload import Workload

        on_gpu = self.torch_device.type == "cuda"
        usual: dict[str, Any] = {"device": self.device, "dtype": "bfloat16" if on_gpu else "float32"}
        if self.tiny:
            usual |= {"batch_size": 2, "tokens": 8, "new_tokens": 3, "repeats": 2, "warmup": 1}
        elif mode == "inference":
            usual |= {"batch_size": 16, "tokens": 512, "new_tokens": 32, "repeats": 6, "warmup": 2}
        else:
            usual |= {"batch_size": 4, "tokens": 256, "learned_tokens": 32, "repeats": 8, "warmup": 3}
        return Workload(**usual | changes)

    def wait(self) -> None:
        """Waits until the device has finished all its work."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, work: Callable[[], object], repeats: int, warmup: int = 1) -> dict[str, Any]:
        """Times some work, including that of the device; returns all seconds, median, lowest and highest."""
        for _ in range(warmup):
            work()
        seconds = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - started)
        return {"median": median(seconds), "low": min(seconds), "high": max(seconds), "values": seconds}

    @contextmanager
    def stage(self, name: str, into: dict[str, Any]) -> Iterator[None]:
        """Measures the seconds and peak memory of the block."""
        from gradpruner.common.memory import PeakMemory

        self.wait()
        started = time.perf_counter()
        with PeakMemory(self.torch_device) as memory:
            yield
            self.wait()
        into[name] = {
            "seconds": time.perf_counter() - started,
            "peak_bytes": memory.peak_bytes,
            "rise_bytes": memory.rise_bytes,
            "memory": memory.kind,
        }
