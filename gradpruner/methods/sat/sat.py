"""SAT-like training: steps leave out heads and channels, fewer with every stage and none in the last."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import TrainerCallback

from gradpruner.common.errors import ConfigError
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.sat.sliced import SlicedModel
from gradpruner.training.callbacks import ClosingCallback

log = logging.getLogger(__name__)

MAX_RATE = 0.95


class SATOptions(MethodOptions):
    """The stages of SAT and their omission rates."""

    stages: int = Field(default=5, ge=2)
    """Stages of equal length, >= 2; the last one leaves nothing out."""
    start_rate: float | None = Field(default=None, gt=0, le=MAX_RATE)
    """Share of the units left out in the first stage, in (0, 0.95]; null: such that the share of the decoder
    left out, averaged over training, is the share that the other methods remove."""


def callbacks(context: MethodContext) -> list[TrainerCallback]:
    """Returns the callback that leaves out heads and channels. The model keeps its size and ends dense.

    In stage t = 0 ... S-1 of S equally long stages, the omission rate is `r_t = r_0 (1 - t / (S-1))`. Every
    optimizer step keeps `ceil((1 - r_t) n)` of the n MLP channels of each layer, drawn without replacement
    with probability proportional to `||W_down[:, j]|| mean|a_j|`, where a is the input of down_proj. KV
    groups (a KV head with all its query heads) are drawn in the same way, by the sum of this value over their
    columns of o_proj. Only the kept rows of q, k, v, gate and up and the kept columns of o and down are
    multiplied, forward and backward. All forward passes of a step keep the same units. Evaluation passes
    leave nothing out.

    Without `start_rate`, r_0 is chosen such that the share of decoder parameters left out, averaged over the
    steps, comes closest to the share that the other methods remove; r_0 is then about twice that share. The
    choice accounts for the rounding up of the number of kept units.

    Means are over all tokens, padding included, of the steps in which a unit was kept; a unit that was never
    kept counts as an average one. Norms are those of the base weights and are recomputed at every stage. In
    a resumed run, the selection of a step still depends on its number and the seed, but the means start
    again, so the run is similar but not equal to an uninterrupted one.

    Source: Sparsity-Accelerated Training for Large Language Models (Ma et al., 2024).
    """
    options = context.options or SATOptions()
    num_remove = context.budget() if options.start_rate is None else 0
    return [OmissionCallback(options, num_remove, context.seed)]


def ladder(step: int, total_steps: int, start_rate: float, stages: int) -> float:
    """Returns the omission rate of an optimizer step, counted from 0; the last stage has rate 0.

    There must be at least as many steps as stages.
    """
    stage = min(step * stages // total_steps, stages - 1)
    return start_rate * (stages - 1 - stage) / (stages - 1)


def num_kept(rate: float, units: int) -> int:
    """Returns how many units of a layer are kept: the share 1 - rate, rounded up, at least one."""
    return max(1, math.ceil(round((1 - rate) * units, 9)))


def sample_units(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws `count` units of every layer without replacement, with probabilities proportional to weights.

    Args:
        weights: Shape (layers, units), >= 0, on the CPU; units of weight 0 are drawn last.
        count: Units to draw per layer.
        generator: On the CPU.

    Returns:
        Indices of the drawn units, ascending, shape (layers, count).

    Source: Weighted random sampling with a reservoir (Efraimidis and Spirakis, 2006).
    """
    uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
    keys = weights.double().log() - (-(uniform.clamp_min(1e-300)).log()).log()
    return keys.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def mean_omitted(start_rate: float, total_steps: int, stages: int, units: Sequence[tuple[int, int]]) -> float:
    """Returns the parameters of a layer left out, averaged over the steps; `units` as in `SlicedModel`."""
    steps = [0] * stages
    for step in range(total_steps):
        steps[min(step * stages // total_steps, stages - 1)] += 1
    rates = [ladder(stage, stages, start_rate, stages) for stage in range(stages)]
    omitted = [sum((n - num_kept(rate, n)) * size for n, size in units) for rate in rates]
    return sum(count * value for count, value in zip(steps, omitted, strict=True)) / total_steps


def matched_rate(wanted: float, total_steps: int, stages: int, units: Sequence[tuple[int, int]]) -> float:
    """Returns the rate of the first stage with which `mean_omitted` comes closest to `wanted`.

    Raises:
        ConfigError: If that rate would be above 0.95.
    """

    def found(rate: float) -> float:
        return mean_omitted(rate, total_steps, stages, units)

    low, high = 0.0, MAX_RATE
    if found(high) < wanted:
        raise ConfigError(
            f"To leave out {wanted:.0f} parameters of a layer on average, the omission rate would have to "
            f"begin above {MAX_RATE}: it falls to 0, so its average is about half of its first value.",
            hint="Remove fewer parameters (plan.num_prune), or set methods.sat.start_rate.",
        )
    # The number left out is a step function of the rate: the answer is one of the two sides of a step.
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < wanted else (low, middle)
    return min((high, low), key=lambda rate: abs(found(rate) - wanted))


class OmissionCallback(ClosingCallback):
    """Leaves heads and channels out of every step, at the rate of `ladder`; works with any Trainer.

    `num_remove` parameters are left out on average, unless the options set a `start_rate`.

    Attributes:
        start_rate: Rate of the first stage; set when training begins.
        omitted_fraction: Planned share of the decoder's parameters left out, averaged over the steps.
        rates: Omission rates of all steps so far.

    Raises:
        ConfigError: When training begins, if the rate would have to be above 0.95, there are fewer than two
            steps, or the model is compiled or split over several GPUs.
        ModelError: When training begins, as `SlicedModel`.
    """

    def __init__(self, options: SATOptions, num_remove: int, seed: int) -> None:
        self.options, self.num_remove, self.seed = options, num_remove, seed
        self.start_rate, self.omitted_fraction = 0.0, 0.0
        self.rates: list[float] = []
        self._sliced: SlicedModel | None = None
        self._norms: tuple[float, dict[str, Tensor]] | None = None
        self._stages = options.stages

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Chooses the rate of the first stage and prepares the linears."""
        _check(state.max_steps, args.torch_compile)
        if args.n_gpu > 1:
            raise ConfigError(
                f"SAT cannot train on {args.n_gpu} GPUs without a launcher.",
                hint="Set CUDA_VISIBLE_DEVICES to one GPU.",
            )
        self.close()
        self._stages = min(self.options.stages, state.max_steps)
        self.rates, self._norms = [], None
        self._sliced = sliced = SlicedModel(kwargs["model"])
        units, layers = sliced.units, len(sliced.layers)
        try:
            self.start_rate = self.options.start_rate or matched_rate(
                self.num_remove / layers, state.max_steps, self._stages, units
            )
        except ConfigError:
            self.close()
            raise
        omitted = layers * mean_omitted(self.start_rate, state.max_steps, self._stages, units)
        self.omitted_fraction = omitted / sliced.decoder_parameters
        log.info(
            "SAT: %d stages from an omission rate of %.3f; %.1f %% of the decoder left out on average.",
            self._stages,
            self.start_rate,
            100 * self.omitted_fraction,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws the units of this step."""
        if self._sliced is None:
            return
        rate = ladder(state.global_step, state.max_steps, self.start_rate, self._stages)
        self.rates.append(rate)
        kept = [num_kept(rate, units) for units, _ in self._sliced.units]
        if kept == [units for units, _ in self._sliced.units]:
            self._sliced.keep(None, None)
            return
        if self._norms is None or self._norms[0] != rate:
            self._norms = (rate, self._sliced.column_norms())
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.global_step)
        groups, channels = self._sliced.importance(self._norms[1])
        self._sliced.keep(
            sample_units(groups, kept[0], generator), sample_units(channels, kept[1], generator)
        )

    def close(self) -> None:
        """Restores the forward methods of the linears."""
        if self._sliced is not None:
            self._sliced.restore()
        self._sliced = None


def _check(steps: int, compiled: bool) -> None:
    """Raises ConfigError if SAT cannot change a training of `steps` optimizer steps."""
    if steps < 2:
        raise ConfigError(
            f"SAT leaves out less from stage to stage and needs at least two optimizer steps; this training "
            f"has {steps}.",
            hint="Raise finetune.epochs (recover.epochs for a tuned model), or lower finetune.accumulation "
            "or finetune.batch_size.",
        )
    if compiled:
        raise ConfigError(
            "SAT changes what linears compute, so torch.compile would recompile at every step.",
            hint="Set finetune.compile to false.",
        )


METHODS.register("sat")(
    Method(
        "SAT-like: leaves out heads and channels while training, fewer with every stage; ends dense",
        callbacks=callbacks,
        check=lambda tuning, steps: _check(steps, tuning.compile),
        options=SATOptions,
        label="SAT-like",
    )
)
