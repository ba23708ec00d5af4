"""TraceWriter: records a GradientTrace step by step while a model is trained.

A background thread writes one file per step, so that host memory holds the factors of at most two steps.
Shape suffixes are those of trace.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gradpruner.common.errors import IntegrityError
from gradpruner.common.files import save_tensors
from gradpruner.gradients.gates import Gates
from gradpruner.gradients.importance import gram_energies
from gradpruner.gradients.trace import (
    ENERGIES_FILE,
    GATES_FILE,
    TRACE_FILE,
    GradientTrace,
    LinearRef,
    TraceInfo,
    factor_file,
)


class TraceWriter:
    """Records a trace step by step.

    With `folder`, host memory holds the factors of two steps (one being written, one being filled); without,
    those of all steps. Energies take 8 bytes per linear and step.

    Args:
        linears: The linears whose gradients are added in every step, in order.
        folder: Where to write the factors; None keeps them in memory. An older trace in the folder is
            deleted, so that its factors cannot be mistaken for those of this run.
        keep_factors: Whether to keep the factors. Energies alone are kilobytes.
    """

    def __init__(self, linears: Sequence[LinearRef], folder: Path | None, keep_factors: bool = True) -> None:
        self.info = TraceInfo(num_layers=0, linears=tuple(linears))
        self.folder = folder
        self.keep_factors = keep_factors
        self._groups = self.info.groups()
        self._energies: list[Tensor] = []
        self._gates: list[Tensor | None] = []
        self._memory: list[dict[str, Tensor]] = []
        self._pool = ThreadPoolExecutor(max_workers=1) if folder and keep_factors else None
        self._pending: Future[None] | None = None
        if folder is not None:
            stale = [
                folder / TRACE_FILE,
                folder / ENERGIES_FILE,
                folder / GATES_FILE,
                *factor_file(folder, 0).parent.glob("step-*"),
            ]
            for path in stale:
                path.unlink(missing_ok=True)

    @property
    def num_steps(self) -> int:
        """Number of steps recorded so far."""
        return len(self._energies)

    def add_step(
        self, grad_b: Sequence[Tensor], grad_a: Sequence[Tensor], gates_EL: Tensor | None = None
    ) -> int | None:
        """Records the gradients of one step, one pair per linear, on any device.

        Args:
            grad_b: Gradients of LoRA B, each (out_features, rank).
            grad_a: Gradients of LoRA A, each (rank, in_features).
            gates_EL: Gates of the step's examples, shape (examples, layers). The trace has gates only if
                every step has them.

        Returns:
            None if all gradients are finite. Otherwise the position of the first linear with NaN or Inf; the
            step is not recorded then.
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
        self._gates.append(gates_EL)
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
            self._pending.result()  # raises an error of the writing thread here, such as a full disk

    def finish(self, info: TraceInfo) -> GradientTrace:
        """Waits for the last factor file, writes the other files and returns the trace.

        Raises:
            IntegrityError: If no step was recorded.
        """
        self._wait()
        if self._pool is not None:
            self._pool.shutdown()
        if not self._energies:
            raise IntegrityError("No step was recorded.", hint="See the messages above.")
        energies_SK = torch.stack(self._energies)
        memory = self._memory if self._memory else None
        gates, note = self._joined_gates()
        if note:
            info = replace(info, notes=(*info.notes, note))
        trace = GradientTrace(info, energies_SK, self.folder, memory, gates)
        if self.folder is not None:
            trace.save(self.folder)
        return trace

    def _joined_gates(self) -> tuple[Gates | None, str]:
        """Returns the finite gates of all steps, and a note if there are others or none."""
        steps = [gates_EL for gates_EL in self._gates if gates_EL is not None]
        if len(steps) < len(self._gates):
            return None, ""
        # Gates can be NaN or Inf even if the gradients of all weights are finite.
        finite = [gates_EL[torch.isfinite(gates_EL).all(dim=1)] for gates_EL in steps]
        lost = sum(map(len, steps)) - sum(map(len, finite))
        note = f"gates of {lost} examples left out: NaN or Inf" if lost else ""
        gates_EL = torch.cat(finite).double()
        if len(gates_EL) == 0:
            return None, note or "no gates: no backward pass went through the layers"
        return Gates(gates_EL, tuple(map(len, finite))), note
