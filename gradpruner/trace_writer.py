"""TraceWriter: collects a GradientTrace step by step while a model is trained.

A thread writes one file a step, so that at most two steps' factors are in host memory at a time.
Shape suffixes as in trace.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gradpruner.errors import IntegrityError
from gradpruner.files import save_tensors
from gradpruner.trace import (
    ENERGIES_FILE,
    TRACE_FILE,
    GradientTrace,
    LinearRef,
    TraceInfo,
    factor_file,
    gram_energies,
)


class TraceWriter:
    """Collects a trace step by step.

    Host memory: the factors of two steps when `folder` is given (one being written, one being
    filled), of all steps otherwise; energies are 8 bytes per linear and step.

    Args:
        linears: What every step brings, in order.
        folder: Where factors go; None keeps them in memory. An older trace in it is deleted, so that
            no factors of another run are ever taken for this one's.
        keep_factors: False records energies only, kilobytes in all.
    """

    def __init__(self, linears: Sequence[LinearRef], folder: Path | None, keep_factors: bool = True) -> None:
        self.info = TraceInfo(num_layers=0, linears=tuple(linears))
        self.folder = folder
        self.keep_factors = keep_factors
        self._groups = self.info.groups()
        self._energies: list[Tensor] = []
        self._memory: list[dict[str, Tensor]] = []
        self._pool = ThreadPoolExecutor(max_workers=1) if folder and keep_factors else None
        self._pending: Future[None] | None = None
        if folder is not None:
            stale = [
                folder / TRACE_FILE,
                folder / ENERGIES_FILE,
                *factor_file(folder, 0).parent.glob("step-*"),
            ]
            for path in stale:
                path.unlink(missing_ok=True)

    @property
    def num_steps(self) -> int:
        """Steps taken in so far."""
        return len(self._energies)

    def add_step(self, grad_b: Sequence[Tensor], grad_a: Sequence[Tensor]) -> int | None:
        """Takes in one step's gradients, one pair per linear, on any device.

        Returns:
            None when all are finite; else the position of the first linear that is not, and the step
            is not recorded.
        """
        energy_K = torch.empty(len(self.info.linears), dtype=torch.float64)
        host: dict[str, Tensor] = {}
        for g, members in enumerate(self._groups):
            b_NOR = torch.stack([grad_b[k].detach() for k in members])
            a_NRI = torch.stack([grad_a[k].detach() for k in members])
            energy_K[members] = gram_energies(b_NOR, a_NRI)
            if self.keep_factors:
                host[f"grad_b.{g}"] = b_NOR.float().cpu()
                host[f"grad_a.{g}"] = a_NRI.float().cpu()
        if not bool(torch.isfinite(energy_K).all()):
            return int((~torch.isfinite(energy_K)).nonzero()[0])
        self._store(host)
        self._energies.append(energy_K)
        return None

    def _store(self, host: dict[str, Tensor]) -> None:
        if not self.keep_factors:
            return
        if self._pool is None:
            self._memory.append(host)
            return
        assert self.folder is not None
        path = factor_file(self.folder, self.num_steps)
        self._wait()
        self._pending = self._pool.submit(save_tensors, path, host, {})

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()  # re-raises a full disk in the training thread

    def finish(self, info: TraceInfo) -> GradientTrace:
        """Waits for the last file, writes the index, and returns the trace.

        Raises:
            IntegrityError: If not a single step was recorded.
        """
        self._wait()
        if self._pool is not None:
            self._pool.shutdown()
        if not self._energies:
            raise IntegrityError("No step was recorded.", hint="See the messages above.")
        energies_SK = torch.stack(self._energies)
        memory = self._memory if self._memory else None
        trace = GradientTrace(info, energies_SK, self.folder, memory)
        if self.folder is not None:
            trace.save(self.folder)
        return trace
