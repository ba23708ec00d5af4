"""Models whose weights are read from their files when they are used, and forgotten right after.

The model's own forward pass runs, so whatever it does between its layers is done here too; memory is that of
its largest weight, rows of the embeddings and blocks of the head apart, however large the model is.
"""

from __future__ import annotations

import copy
import mmap
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradpruner.models.classes import model_class
from gradpruner.models.headers import TensorRef
from gradpruner.models.layers import LayeredModel
from gradpruner.pruning.pieces import TORCH_DTYPES
from gradpruner.pruning.writer import read_tensor

_BLOCK_BYTES = 64 << 20  # of a weight that is used block by block, in the dtype it is computed in


class Unmatched(Exception):
    """A parameter is stored in another form than it is computed with: the model must be loaded whole."""


class Reader:
    """Maps tensors into memory and converts them to the dtype they are computed in.

    What it returns is valid until the next call: the memory that is converted into is used again.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.memory = torch.empty(0, dtype=dtype)

    def __call__(self, ref: TensorRef) -> Tensor:
        """The tensor, in the reader's dtype."""
        stored = _mapped(ref)
        if stored.dtype == self.dtype or not stored.is_floating_point():
            return stored
        if self.memory.numel() < stored.numel():
            self.memory = torch.empty(0, dtype=self.dtype)  # freed before the larger one is taken
            self.memory = torch.empty(stored.numel(), dtype=self.dtype)
        return self.memory[: stored.numel()].view(stored.shape).copy_(stored)


def _mapped(ref: TensorRef) -> Tensor:
    """A tensor whose numbers stay in the page cache; they leave the process with it."""
    dtype = TORCH_DTYPES[ref.dtype]
    if not ref.num_bytes or ref.start % dtype.itemsize:  # none, or where torch could not address them
        return read_tensor(ref)
    before = ref.start % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    with ref.file.open("rb") as file:
        pages = mmap.mmap(
            file.fileno(),
            before + ref.num_bytes,
            flags=flags,
            prot=mmap.PROT_READ,
            offset=ref.start - before,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it must not be written to: it is not
        flat = torch.frombuffer(pages, dtype=dtype, count=ref.num_bytes // dtype.itemsize, offset=before)
    return flat.view(ref.shape)


class FileWeight(torch.Tensor):
    """A parameter that is in a file until an operation needs its numbers.

    `embedding` reads only the rows it looks up, `linear` goes through large weights block by block; every
    other operation reads all of it.
    """

    ref: TensorRef
    reader: Reader

    @staticmethod
    def __new__(cls, ref: TensorRef, reader: Reader) -> FileWeight:
        """Announces shape and dtype; reads nothing."""
        made: FileWeight = torch.Tensor._make_wrapper_subclass(
            cls, ref.shape, dtype=reader.dtype, device=torch.device("cpu")
        )
        made.ref, made.reader = ref, reader
        made._is_param = True  # what makes it an nn.Parameter for isinstance
        return made

    def rows(self, first: int, stop: int) -> Tensor:
        """Some rows, valid until the next is read."""
        size = self.ref.num_bytes // self.shape[0]
        start = self.ref.start + first * size
        part = replace(
            self.ref, shape=(stop - first, *self.shape[1:]), start=start, stop=start + (stop - first) * size
        )
        return self.reader(part)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Lookups and products by parts; the rest goes on to `__torch_dispatch__`."""
        if func is nn.functional.embedding and isinstance(args[1], FileWeight):
            return _looked_up(args[0], args[1])
        if func is nn.functional.linear and isinstance(args[1], FileWeight):
            return _product(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reads what the operation needs."""

        def filled(value: Any) -> Any:
            return value.reader(value.ref).clone() if isinstance(value, FileWeight) else value

        return func(*tree_map(filled, args), **tree_map(filled, kwargs or {}))


def _looked_up(ids: Tensor, weight: FileWeight) -> Tensor:
    rows, places = ids.unique(return_inverse=True)
    table = torch.stack([weight.rows(row, row + 1)[0].clone() for row in rows.tolist()])
    return table[places]


def _product(given: Tensor, weight: FileWeight, bias: Tensor | None = None) -> Tensor:
    rows = max(1, _BLOCK_BYTES // max(1, weight.reader.dtype.itemsize * weight.shape[-1]))
    if isinstance(bias, FileWeight):
        bias = bias.reader(bias.ref).clone()
    parts = [
        nn.functional.linear(given, weight.rows(first, min(first + rows, weight.shape[0])))
        for first in range(0, weight.shape[0], rows)
    ]
    out = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return out if bias is None else out + bias


@torch.no_grad()
def on_demand(
    config: Any,
    tensors: Mapping[str, TensorRef],
    prefix: str,
    dtype: torch.dtype,
    passed: Collection[int] = (),
) -> nn.Module:
    """A model in evaluation mode whose parameters are read from files when they are used.

    Args:
        config: Its transformers config.
        tensors: By name in the checkpoint.
        prefix: Under which name the layers are there.
        dtype: What it computes in.
        passed: Layers that hand on what they were given. They run on torch's meta device, without numbers,
            so that a cache keeps its places.

    Raises:
        Unmatched: If a parameter is not in the files in the form it is computed with.
    """
    with init_empty_weights():  # not torch's meta device: buffers have numbers
        model = model_class(config)._from_config(copy.deepcopy(config), dtype=dtype).eval()
    model.tie_weights()  # which makes one parameter of two only out there
    view = LayeredModel(model)
    for index in passed:
        view.layers[index] = _without_numbers(view.layers[index])
    _fill(model, _Names(tensors, view.family.layers_path, prefix), Reader(dtype), set(passed))
    return cast(nn.Module, model)


class _Names:
    """Names in memory -> tensors on disk, where layers and what is around them may have other prefixes."""

    def __init__(self, tensors: Mapping[str, TensorRef], path: str, prefix: str) -> None:
        self.tensors = tensors
        self.layers = path + "."
        end = 0
        while end < min(len(path), len(prefix)) and path[-1 - end] == prefix[-1 - end]:
            end += 1
        self.before, self.after = path[: len(path) - end], prefix[: len(prefix) - end]

    def find(self, name: str) -> TensorRef | None:
        """The tensor of that name in memory."""
        if name.startswith(self.before):
            renamed = self.after + name[len(self.before) :]
            if renamed in self.tensors:
                return self.tensors[renamed]
        return self.tensors.get(name)


def _fill(model: nn.Module, names: _Names, reader: Reader, passed: Collection[int]) -> None:
    """Puts a `FileWeight` in the place of every parameter, and the stored numbers into buffers."""
    gone = tuple(f"{names.layers}{index}." for index in passed)
    stored = set(model.state_dict())  # asked before: it would read every weight
    made: dict[int, FileWeight] = {}
    several: dict[int, set[str]] = {}
    places = [
        (f"{path}.{key}" if path else key, module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    for name, _, _, parameter in places:
        ref = names.find(name)
        if ref is not None and not name.startswith(gone):
            if ref.shape != tuple(parameter.shape) or ref.dtype not in TORCH_DTYPES:
                raise Unmatched(f"'{name}' is stored in another form than it is computed with")
            several.setdefault(id(parameter), set()).add(ref.name)
            made.setdefault(id(parameter), FileWeight(ref, reader))
    for name, module, key, parameter in places:
        if name.startswith(gone):
            continue
        if len(several.get(id(parameter), ())) > 1:
            raise Unmatched(f"'{name}' is tied to another tensor but stored by itself")
        if id(parameter) not in made:
            raise Unmatched(f"'{name}' is stored under another name")
        module._parameters[key] = made[id(parameter)]
    for name, buffer in model.named_buffers():
        if name not in stored or name.startswith(gone):
            continue  # computed, not stored
        ref = names.find(name)
        if ref is None or ref.shape != tuple(buffer.shape) or ref.dtype not in TORCH_DTYPES:
            raise Unmatched(f"'{name}' is stored in another form than it is computed with")
        buffer.copy_(reader(ref))


def _without_numbers(layer: nn.Module) -> nn.Module:
    """A layer that runs on shapes alone and hands on what it was given."""
    bare: Any = copy.deepcopy(layer).to("meta")
    forward = bare.forward

    def shapes(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        out = forward(*tree_map(shapes, args), **tree_map(shapes, kwargs))
        return (given, *out[1:]) if isinstance(out, tuple) else given

    bare.forward = hand_on
    return cast(nn.Module, bare)
