"""GradientTrace: the LoRA gradients of the first steps, as layer energies and as factors.

Shape suffixes: S steps, K linears (of all layers), N linears of one shape, O out_features, I in_features,
R LoRA rank.

The energy of a linear at a step is `||G||_F**2`, the squared Frobenius norm of the simulated gradient
`G = grad_B @ grad_A`. It equals `<grad_B^T grad_B, grad_A grad_A^T>`, the product of two R x R matrices, so
layer scores never need an (out, in) matrix. The factors grad_B and grad_A are kept for merging, in one
safetensors file per step.

On disk, a trace is a folder with `trace.json`, `energies.safetensors`, `gates.safetensors` (if gates were
recorded) and `factors/step-00001.safetensors`, ...
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradpruner.common.errors import IntegrityError, PlanError, ShapeError
from gradpruner.common.files import folder_bytes, save_tensors
from gradpruner.common.json_files import read_versioned, write_json
from gradpruner.common.printing import Printed, print_table
from gradpruner.gradients.gates import Gates, load_gates, save_gates
from gradpruner.gradients.importance import Factors

if TYPE_CHECKING:
    from rich.console import Console

TRACE_FILE = "trace.json"
ENERGIES_FILE = "energies.safetensors"
GATES_FILE = "gates.safetensors"
FORMAT_VERSION = 1
# Replaces the hash of the weights in the fingerprint of a quantised model.
QUANTISED = "-quantised"
_FORMER_FIELDS = ("complete", "data_sha256")


@dataclass(frozen=True)
class LinearRef:
    """One linear of one decoder layer.

    Attributes:
        layer: Index of the decoder layer, from 0.
        name: Path of the linear inside the layer, e.g. "self_attn.q_proj".
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        rank: LoRA rank.
    """

    layer: int
    name: str
    out_features: int
    in_features: int
    rank: int


@dataclass(frozen=True)
class TraceInfo:
    """What was recorded and under which conditions.

    Attributes:
        num_layers: Decoder layers of the model.
        linears: The recorded linears, in the order of every K dimension.
        model: Fingerprint of the model (see `layers.fingerprint`).
        adapter: "lora", "rslora", "dora" or "qlora".
        alpha: LoRA alpha.
        clip: Norm the gradients were clipped to before recording, or None for raw gradients.
        seed: Seed of the run.
        losses: Training loss of every logged step; there may be fewer than recorded steps.
        learning_rates: Learning rate of every recorded step.
        notes: Anything unusual, in words, for example that recording ended early.
    """

    num_layers: int
    linears: tuple[LinearRef, ...]
    model: str = ""
    adapter: str = "lora"
    alpha: float = 0.0
    clip: float | None = None
    seed: int | None = None
    losses: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The LoRA rank; the largest one if linears differ."""
        return max(ref.rank for ref in self.linears)

    def groups(self) -> list[list[int]]:
        """Returns the positions of linears grouped by shape and rank, in order of first appearance."""
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        for k, ref in enumerate(self.linears):
            by_shape.setdefault((ref.out_features, ref.in_features, ref.rank), []).append(k)
        return list(by_shape.values())


class GradientTrace(Printed):
    """An immutable record of the first fine-tuning steps.

    Args:
        info: What was recorded.
        energies_SK: Squared Frobenius norm of every simulated gradient, shape (steps, linears), fp64.
        folder: Folder of the factor files, or None.
        factors: Factors of every step in host memory; None if they are in `folder` or were not recorded.
        gates: Gates of the examples of these steps; None if they were not recorded.

    Raises:
        ShapeError: If energies, gates and linears do not match.
    """

    def __init__(
        self,
        info: TraceInfo,
        energies_SK: Tensor,
        folder: Path | None = None,
        factors: Sequence[dict[str, Tensor]] | None = None,
        gates: Gates | None = None,
    ) -> None:
        if energies_SK.ndim != 2 or energies_SK.shape[1] != len(info.linears):
            raise ShapeError(
                f"The energies have shape {tuple(energies_SK.shape)} for {len(info.linears)} linears; "
                "(steps, linears) is needed."
            )
        outside = [ref for ref in info.linears if not 0 <= ref.layer < info.num_layers]
        if outside:
            raise ShapeError(
                f"The trace places '{outside[0].name}' in layer {outside[0].layer} of a model with "
                f"{info.num_layers} layers."
            )
        shape = (len(gates.per_step), gates.values_EL.shape[1]) if gates else None
        if shape not in (None, (len(energies_SK), info.num_layers)):
            raise ShapeError(
                f"The gates cover {shape[0]} steps and {shape[1]} layers, the energies of "
                f"{len(energies_SK)} steps and {info.num_layers} layers."
            )
        self.info = info
        self.gates = gates
        self.energies_SK = energies_SK.double()
        self.folder = folder
        self._factors = factors
        self._position = {k: (g, i) for g, members in enumerate(info.groups()) for i, k in enumerate(members)}
        self._index = {(ref.layer, ref.name): k for k, ref in enumerate(info.linears)}

    @property
    def num_steps(self) -> int:
        """Number of recorded optimizer steps, including those with zero energy."""
        return self.energies_SK.shape[0]

    @property
    def effective_steps(self) -> int:
        """Number of steps with non-zero energy. LoRA B starts at zero, so the first step has zero energy."""
        return int((self.energies_SK.sum(dim=1) > 0).sum())

    @property
    def has_factors(self) -> bool:
        """Whether the factors were kept, which element importance and hence merging need."""
        return self._factors is not None or (self.folder is not None and self._factor_file(0).exists())

    def check_model(self, num_layers: int, identity: str) -> None:
        """Raises PlanError if another model was recorded. An `identity` of "" is not compared."""
        if self.info.num_layers != num_layers:
            raise PlanError(
                f"The trace was recorded on {self.info.num_layers} layers; this model has {num_layers}.",
                hint="Record on this model.",
            )
        if self.info.model and identity and not same_model(self.info.model, identity):
            raise PlanError(
                f"The trace was recorded on model {self.info.model}; this is {identity}.",
                hint="Record on this model.",
            )

    def show(self, console: Console) -> None:
        """Prints what was recorded."""
        info, losses = self.info, self.info.losses
        rows = {
            "steps": f"{self.num_steps}, {self.effective_steps} of them with energy",
            "layers and linears": f"{info.num_layers}, {len(info.linears)}",
            "adapter": f"{info.adapter}, rank {info.rank}, alpha {info.alpha:g}",
            "loss": f"{losses[0]:.3g} at the start, {losses[-1]:.3g} at the end" if losses else "not logged",
            "examples with gates": len(self.gates.values_EL) if self.gates else "none",
            "factors, for merging": "yes" if self.has_factors else "no",
        }
        print_table(console, "Recorded gradients", ("", ""), rows.items(), info.notes)

    def layer_energies(self, power: float = 1.0) -> Tensor:
        """Returns the energies summed over the linears of every layer.

        Args:
            power: Exponent applied to each linear's energy before summing; 0.5 gives Frobenius norms.

        Returns:
            Shape (steps, layers), float64.
        """
        layers_K = torch.tensor([ref.layer for ref in self.info.linears])
        out_SL = torch.zeros(self.num_steps, self.info.num_layers, dtype=torch.float64)
        return out_SL.index_add_(1, layers_K, self.energies_SK**power)

    def gate_rows(self) -> Tensor:
        """Returns the gate gradients of every recorded example, shape (examples, layers), float64.

        Raises:
            PlanError: If the trace holds no gates.
        """
        if self.gates is None:
            why = [note for note in self.info.notes if "gates" in note]
            raise PlanError(
                f"This trace holds no gates{f' ({why[0]})' if why else ''}.",
                hint="Choose a method that needs no gates."
                if why
                else "Delete the trace folder and record again, or choose a method that needs no gates.",
            )
        return self.gates.values_EL

    def linear_names(self, layer: int) -> list[str]:
        """Returns the names of the recorded linears of one layer."""
        return [ref.name for ref in self.info.linears if ref.layer == layer]

    def factors(self, layer: int, name: str) -> Factors:
        """Returns the LoRA gradients of one linear over all steps, float32 on the CPU.

        Raises:
            PlanError: If this linear was not recorded, or the trace holds energies only.
        """
        if (layer, name) not in self._index:
            raise PlanError(
                f"The trace holds no gradients of '{name}' in layer {layer}.",
                hint=f"Recorded in this layer: {', '.join(self.linear_names(layer)) or 'nothing'}.",
            )
        if not self.has_factors:
            raise PlanError(
                "This trace holds layer energies only; merging needs the LoRA gradients of every step.",
                hint="Record again with keep_factors=True, or plan with num_merge=0.",
            )
        group, row = self._position[self._index[layer, name]]
        grad_b, grad_a = [], []
        for step in range(self.num_steps):
            b, a = self._read_step(step, group, row)
            grad_b.append(b)
            grad_a.append(a)
        return Factors(torch.stack(grad_b).float(), torch.stack(grad_a).float())

    def check_factors(self) -> None:
        """Checks that all factor files exist, are complete and have the recorded shapes.

        Reads their headers only, so it is cheap. Call it before changing weights: a damaged file found later
        would leave the model half merged.

        Raises:
            IntegrityError: If a file is missing, truncated or has other shapes. The message names the file.
        """
        for step in range(self.num_steps) if self._factors is None else ():
            path = self._factor_file(step)
            with _opened(path) as file:
                for group, members in enumerate(self.info.groups()):
                    ref = self.info.linears[members[0]]
                    expected = {
                        f"grad_b.{group}": [len(members), ref.out_features, ref.rank],
                        f"grad_a.{group}": [len(members), ref.rank, ref.in_features],
                    }
                    for name, shape in expected.items():
                        found = file.get_slice(name).get_shape() if name in file.keys() else "nothing"  # noqa: SIM118
                        if found != shape:
                            raise IntegrityError(
                                f"{path} holds {found} as '{name}'; a tensor of shape {shape} is needed.",
                                hint="Delete the trace folder and record again.",
                            )

    def _factor_file(self, step: int) -> Path:
        assert self.folder is not None  # otherwise the factors are in memory
        return factor_file(self.folder, step)

    def _read_step(self, step: int, group: int, row: int) -> tuple[Tensor, Tensor]:
        if self._factors is not None:
            tensors = self._factors[step]
            return tensors[f"grad_b.{group}"][row], tensors[f"grad_a.{group}"][row]
        with _opened(self._factor_file(step)) as file:  # memory-mapped: only this row is read
            return file.get_slice(f"grad_b.{group}")[row], file.get_slice(f"grad_a.{group}")[row]

    def save(self, folder: Path) -> Path:
        """Writes the trace to `folder`; factors that are there already are not copied."""
        if self._factors is not None:
            for step, tensors in enumerate(self._factors):
                save_tensors(factor_file(folder, step), tensors, {})
        elif self.has_factors and self.folder is not None and folder.resolve() != self.folder.resolve():
            for step in range(self.num_steps):
                factor_file(folder, step).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._factor_file(step), factor_file(folder, step))
        save_tensors(folder / ENERGIES_FILE, {"energies": self.energies_SK}, {})
        save_gates(folder / GATES_FILE, self.gates)
        write_json(folder / TRACE_FILE, {"format_version": FORMAT_VERSION, **asdict(self.info)})
        return folder / TRACE_FILE

    @classmethod
    def load(cls, folder: str | Path) -> GradientTrace:
        """Reads a trace folder.

        Raises:
            IntegrityError: If a file is missing or damaged, or the files do not match.
        """
        folder = Path(folder)
        path, hint = folder / TRACE_FILE, "Record again."
        info = read_versioned(path, "gradient trace", TraceInfo, FORMAT_VERSION, hint, _FORMER_FIELDS)
        try:
            least = (min(ref.layer + 1, ref.out_features, ref.in_features, ref.rank) for ref in info.linears)
            if min(least, default=0) < 1:
                raise ValueError("it lists no linears, or one without rows, columns, rank or a layer")
            with safe_open(folder / ENERGIES_FILE, framework="pt") as file:
                energies_SK = file.get_tensor("energies")
            gates = load_gates(folder / GATES_FILE)
            trace = cls(info, energies_SK, folder, gates=gates)
        except Exception as error:  # a damaged or foreign file can raise anything
            raise IntegrityError(
                f"{folder} does not hold a usable gradient trace: {str(error).rstrip('.')}.", hint=hint
            ) from error
        if not bool((torch.isfinite(energies_SK) & (energies_SK >= 0)).all()):
            raise IntegrityError(f"The trace in {folder} holds NaN, Inf or negative energies.", hint=hint)
        if gates is not None and not bool(torch.isfinite(gates.values_EL).all()):
            raise IntegrityError(f"The trace in {folder} holds NaN or Inf gates.", hint=hint)
        return trace

    def bytes_on_disk(self) -> int:
        """Returns the size of the trace folder in bytes; 0 if the trace is in memory."""
        return folder_bytes(self.folder) if self.folder is not None else 0


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file. Raises IntegrityError if it is damaged or missing, or lacks a tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"The recorded gradients in {path} cannot be read: {error}.",
            hint="Delete the trace folder and record again.",
        ) from error


def factor_file(folder: Path, step: int) -> Path:
    """Returns the path of the factors of one step, counted from 0 (in the file name from 1)."""
    return folder / "factors" / f"step-{step + 1:05d}.safetensors"


def same_model(one: str, other: str) -> bool:
    """Returns whether two fingerprints (`layers.fingerprint`) can belong to the same model.

    The weights of a quantised model are no longer exact, so only type, depth and width are compared then.
    """
    if one.endswith(QUANTISED) or other.endswith(QUANTISED):
        return one.rpartition("-")[0] == other.rpartition("-")[0]
    return one == other


def trace_digest(trace: GradientTrace) -> str:
    """Returns the SHA-256 of the recorded energies and of `trace.info`."""
    digest = hashlib.sha256(json.dumps(asdict(trace.info), sort_keys=True).encode())
    digest.update(trace.energies_SK.numpy().tobytes())
    return digest.hexdigest()
