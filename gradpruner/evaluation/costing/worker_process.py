"""The process that measures one model in one mode, told what to do by lines of JSON.

A process of its own, because memory a process once held counts in its peak for ever after, and because a
model that does not fit should take nothing else with it. It runs a step when it is told to, so that two of
these can take turns. What is run is what users run: `finetuning.finetune` and `generate`.

    in   {"mode": ..., "folder" or "config": ..., "workload": {...}}
    out  {"ready": true}
    in   go                                     as often as there are steps
    out  {"step_seconds": 0.81}                 or prefill_seconds and decode_seconds
    out  {"peak_bytes": ..., "empty_bytes": ..., "kind": "rss"}     after the last; or {"error": ...}
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gradpruner.errors import GradPrunerError
from gradpruner.evaluation.costing.gate import Gate, random_ids
from gradpruner.evaluation.costing.workload import Workload
from gradpruner.models.loading import load_model, resolve_device, resolve_dtype
from gradpruner.models.sizes import PeakMemory
from gradpruner.progress import set_mode


class TokenTimes(BaseStreamer):
    """Notes when each token came out of `generate`; the first call brings the prompt."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.seconds: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then with every token of the batch."""
        self.seconds.append(self.gate.seconds())

    def end(self) -> None:
        """Called after the last one."""


def measure_inference(model: Any, workload: Workload, gate: Gate) -> tuple[int, str]:
    """Generates greedily from random prompts, once at every go; returns the peak memory and its kind."""
    rows = random_ids(model, workload, rows=workload.batch_size * workload.steps)
    config = GenerationConfig(
        do_sample=False,
        min_new_tokens=workload.new_tokens,
        max_new_tokens=workload.new_tokens,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
    )
    with PeakMemory(gate.device) as memory, torch.inference_mode():
        for step in range(workload.steps):
            batch = rows[step * workload.batch_size : (step + 1) * workload.batch_size]
            prompt = torch.tensor(batch, device=gate.device)
            times = TokenTimes(gate)
            gate.start()
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=times,
            )
            given, first, last = times.seconds[0], times.seconds[1], times.seconds[-1]
            tokens = len(times.seconds) - 2
            gate.say(
                generation_seconds=last,
                prefill_seconds=first - given,
                decode_seconds=(last - first) / tokens,
            )
    return memory.peak_bytes, memory.kind


def build(order: dict[str, Any], workload: Workload, device: torch.device) -> nn.Module:
    """The model of an order, on the device: its weights loaded, or random ones."""
    # As in a run: AdamW's updates are far below the resolution of bfloat16.
    trained = order["mode"] == "full" and workload.dtype == "auto"
    dtype = "float32" if trained else workload.dtype
    if order.get("folder"):
        return load_model(
            Path(order["folder"]),
            dtype=dtype,
            device=str(device),
            attn_implementation=workload.attn,
            native=True,
        )
    raw = order["config"]
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=resolve_dtype(dtype, device), attn_implementation=workload.attn
        )
    return model.to(device).eval()


def exercise(measure: Callable[..., tuple[int, str]], device: torch.device) -> None:
    """Does all of it once with a miniature: what libraries load at first use then counts as empty process."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    small = Workload(batch_size=1, tokens=2, new_tokens=2, repeats=1, warmup=0)
    measure(model, small, Gate(device, io.StringIO("go\n"), io.StringIO()))
    del model
    gc.collect()


def work(commands: TextIO, replies: TextIO) -> None:
    """Carries out the one order that comes first."""
    order = json.loads(commands.readline())
    workload = Workload(**order["workload"])
    set_mode("quiet")
    device = resolve_device(workload.device)
    measure: Callable[..., tuple[int, str]] = measure_inference
    if order["mode"] != "inference":
        from gradpruner.evaluation.costing.gated_training import measure_training

        measure = partial(measure_training, mode=order["mode"])
    exercise(measure, device)
    empty = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    torch.manual_seed(workload.seed)
    gate = Gate(device, commands, replies)
    try:
        model = build(order, workload, device)
        peak, kind = measure(model, workload, gate)
    except GradPrunerError as error:
        gate.say(error=error.message)
    except Exception as error:  # out of memory, kernels that are missing: a library raises what it likes
        gate.say(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    else:
        gate.say(peak_bytes=peak, empty_bytes=empty, kind=kind)


def main() -> None:
    """Keeps standard output for replies; whatever libraries print there goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    work(sys.stdin, replies)


if __name__ == "__main__":
    main()
