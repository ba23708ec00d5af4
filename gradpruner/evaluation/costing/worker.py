"""The process that measures one model in one mode, one step per request.

It runs the functions that users run, `finetune` and `generate`, and waits for a request before every step.
The messages on its pipe:

    in   (subject, mode, workload)
    out  {"ready": True}
    in   anything                               once per step
    out  {"step_seconds": 0.81}                 or prefill_seconds, decode_seconds and generation_seconds
    out  {"peak_bytes": ..., "empty_bytes": ..., "kind": "rss"}     after the last step; or {"error": ...}
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.streamers import BaseStreamer

from gradpruner.common.errors import GradPrunerError
from gradpruner.common.memory import PeakMemory
from gradpruner.common.progress import set_mode
from gradpruner.evaluation.costing.subject import Subject
from gradpruner.evaluation.costing.workload import RECORDING, Workload
from gradpruner.models.loading import load_model, resolve_device, resolve_dtype

# The first tokens of a vocabulary are often special (padding, end), so random input leaves them out.
_FIRST_PLAIN_TOKEN = 3


class StepClock:
    """Lets one step pass at a time and times it; all times are taken here.

    Args:
        device: Device to synchronise before the clock is read, because its kernels run asynchronously.
        turns: Pipe on which steps are requested and times are sent; None runs all steps without waiting and
            sends nothing.
    """

    def __init__(self, device: torch.device, turns: Connection | None) -> None:
        self.device, self._turns = device, turns
        self._ready = False
        self._started = 0.0

    def start(self) -> None:
        """Waits until the next step may run, then starts the clock."""
        if not self._ready:
            self.send(ready=True)
            self._ready = True
        if self._turns is not None:
            self._turns.recv()
        self._started = self._now()

    def seconds(self) -> float:
        """Returns the seconds since `start`, including all work of the device."""
        return self._now() - self._started

    def send(self, **reply: Any) -> None:
        """Sends one message."""
        if self._turns is not None:
            self._turns.send(reply)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


class _TokenTimes(BaseStreamer):
    """Notes the time at which `generate` delivers each token; the first call delivers the prompt."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.seconds: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompts, then with each new token of the batch."""
        self.seconds.append(self.clock.seconds())

    def end(self) -> None:
        """Called after the last token."""


def measure_inference(model: Any, workload: Workload, clock: StepClock) -> tuple[int, str]:
    """Generates greedily from random prompts, once per step; returns the peak memory and its kind."""
    rows = _random_ids(model, workload)
    config = GenerationConfig(
        do_sample=False,
        min_new_tokens=workload.new_tokens,
        max_new_tokens=workload.new_tokens,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
    )
    with PeakMemory(clock.device) as memory, torch.inference_mode():
        for step in range(workload.steps):
            batch = rows[step * workload.batch_size : (step + 1) * workload.batch_size]
            prompt = torch.tensor(batch, device=clock.device)
            times = _TokenTimes(clock)
            clock.start()
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=times,
            )
            began, first, *_, last = times.seconds
            decoding = (last - first) / (len(times.seconds) - 2)
            clock.send(generation_seconds=last, prefill_seconds=first - began, decode_seconds=decoding)
    return memory.peak_bytes, memory.kind


def measure_training(model: nn.Module, workload: Workload, clock: StepClock, *, mode: str) -> tuple[int, str]:
    """Fine-tunes on random samples; returns the peak memory and its kind."""
    # Imported here, because inference does not need the Trainer, whose imports take memory and seconds.
    from transformers import TrainerCallback

    from gradpruner.data.encoding import Collator
    from gradpruner.training.finetuning import finetune
    from gradpruner.training.recording import GradientRecorder

    class Steps(TrainerCallback):
        """Times forward, backward, clipping and optimizer, but not fetching the batch or logging."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.send(step_seconds=clock.seconds())

    with tempfile.TemporaryDirectory() as folder:
        # The recorder expects one more step than is run, so no timed step includes the end of a recording.
        recorder = GradientRecorder(workload.steps + 1, Path(folder) / "trace")
        _, result = finetune(
            model,
            random_samples(model, workload),
            collator=Collator(),
            mode="lora" if mode == RECORDING else mode,
            batch_size=workload.batch_size,
            accumulation=1,
            max_steps=workload.steps,
            seed=workload.seed,
            rank=workload.rank,
            merge_adapter=False,
            callbacks=[Steps(), recorder] if mode == RECORDING else [Steps()],
            gradient_checkpointing=workload.gradient_checkpointing,
            batching=workload.batching,
            liger=workload.liger,
            device="cpu" if clock.device.type == "cpu" else "auto",
        )
    return result.peak_memory_bytes, "cuda" if clock.device.type == "cuda" else "rss"


def build(subject: Subject, mode: str, workload: Workload, device: torch.device) -> nn.Module:
    """Returns the model on the device, with its stored weights or, without any, random ones."""
    dtype, attn = workload.weight_dtype(mode), workload.attn
    if subject.folder is not None:
        return load_model(
            subject.folder, dtype=dtype, device=str(device), attn_implementation=attn, native=True
        )
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(
            subject.config, dtype=resolve_dtype(dtype, device), attn_implementation=attn
        )
    return model.to(device).eval()


def work(turns: Connection) -> None:
    """Receives one order and carries it out."""
    subject, mode, workload = turns.recv()
    set_mode("quiet")
    device = resolve_device(workload.device)
    measure: Callable[..., tuple[int, str]] = measure_inference
    if mode != "inference":
        measure = partial(measure_training, mode=mode)
    _exercise(measure, device)
    empty = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    torch.manual_seed(workload.seed)
    clock = StepClock(device, turns)
    try:
        peak, kind = measure(build(subject, mode, workload, device), workload, clock)
    except EOFError:
        raise SystemExit(0) from None  # the parent process is gone
    except GradPrunerError as error:
        clock.send(error=error.message)
    except Exception as error:  # out of memory, missing kernels: libraries raise all kinds of errors
        clock.send(
            error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
    else:
        clock.send(peak_bytes=peak, empty_bytes=empty, kind=kind)


def main(descriptor: int) -> None:
    """Carries out one order from the pipe with this file descriptor."""
    with suppress(OSError):  # if memory runs out, Linux should kill this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    with Connection(descriptor) as turns:
        work(turns)


def _exercise(measure: Callable[..., tuple[int, str]], device: torch.device) -> None:
    """Runs everything once with a tiny model, so that libraries loaded on first use count as empty."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    measure(
        model, Workload(batch_size=1, tokens=2, new_tokens=2, repeats=1, warmup=0), StepClock(device, None)
    )
    del model
    gc.collect()


def random_samples(model: Any, workload: Workload) -> list[dict[str, list[int]]]:
    """Returns random training samples for all steps; the last tokens of each carry loss."""
    from gradpruner.data.encoding import IGNORED

    samples = []
    generator = torch.Generator().manual_seed(workload.seed)
    shares = torch.rand(workload.steps * workload.batch_size, generator=generator)
    for ids, share in zip(_random_ids(model, workload), shares.tolist(), strict=True):
        if workload.shortest is not None:
            ids = ids[: round(workload.shortest * (workload.tokens / workload.shortest) ** share)]
        ignored = max(0, len(ids) - (workload.learned_tokens or len(ids)))
        samples.append({"input_ids": ids, "labels": [IGNORED] * ignored + ids[ignored:]})
    return samples


def _random_ids(model: Any, workload: Workload) -> list[list[int]]:
    """Returns random ordinary token ids of the model for all steps, shape (steps x batch, tokens)."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(workload.seed)
    first = min(_FIRST_PLAIN_TOKEN, vocabulary - 1)
    shape = (workload.steps * workload.batch_size, workload.tokens)
    ids: list[list[int]] = torch.randint(first, vocabulary, shape, generator=generator).tolist()
    return ids
