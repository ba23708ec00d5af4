"""Models whose weights are read from their files when they are used, and forgotten right after.

The model's own forward pass runs, so whatever it does between its layers is done here too; memory is that of
its largest weight (linears go through block by block, embeddings by rows) however large the model is. Models
that share a `Reader` share what they compute: a product of a weight and numbers it was multiplied with before
is looked up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.initialization import no_init_weights

from gradpruner.models.classes import model_class
from gradpruner.models.headers import TensorRef
from gradpruner.models.layers import LayeredModel, returning_input
from gradpruner.pruning.pieces import TORCH_DTYPES
from gradpruner.pruning.writer import fill, open_source, read_tensor

_BLOCK_BYTES = 2 << 20  # of a weight, in the dtype it is computed in: stays in the cache of a core
_PRODUCT_BYTES = 256 << 20  # of products that are remembered; what comes later is computed again


class Unmatched(Exception):
    """A model cannot run like this: it must be loaded whole."""


class Reader:
    """Reads tensors, converts them to the dtype they are computed in, and remembers products."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._block = torch.empty(0, dtype=dtype)
        self._stored = torch.empty(0, dtype=torch.uint8)
        self._products: dict[TensorRef, list[tuple[Tensor, Tensor]]] = {}
        self._given = torch.empty(0, dtype=dtype)  # the last that was remembered: q, k and v get the same
        self._left = _PRODUCT_BYTES

    def __call__(self, ref: TensorRef) -> Tensor:
        """The whole tensor, in memory of its own."""
        stored = read_tensor(ref)
        return stored.to(self.dtype) if stored.is_floating_point() else stored

    def rows(self, ref: TensorRef, first: int, stop: int) -> Tensor:
        """Some rows of a matrix, valid until the next are read."""
        return next(self._blocks(ref, first, stop, stop - first))

    def product(self, given: Tensor, ref: TensorRef) -> Tensor:
        """The linear without bias, `given @ weight.T`, block by block."""
        for numbers, product in self._products.get(ref, ()):
            if torch.equal(numbers, given):
                return product.clone()
        height = max(1, _BLOCK_BYTES // max(1, self.dtype.itemsize * ref.shape[1]))
        blocks = self._blocks(ref, 0, ref.shape[0], height)
        product = torch.cat([nn.functional.linear(given, block) for block in blocks], dim=-1)
        self._left -= given.nbytes + product.nbytes
        if self._left > 0:
            if not torch.equal(self._given, given):
                self._given = given.clone()
            self._products.setdefault(ref, []).append((self._given, product.clone()))
        return product

    def _blocks(self, ref: TensorRef, first: int, stop: int, height: int) -> Iterator[Tensor]:
        """The rows from `first` to `stop`, `height` at a time, each valid until the next."""
        dtype, width = TORCH_DTYPES[ref.dtype], ref.shape[1]
        size = dtype.itemsize * width
        if self._stored.nbytes < height * size:
            self._stored = torch.empty(height * size, dtype=torch.uint8)
        if self._block.numel() < height * width:
            self._block = torch.empty(height * width, dtype=self.dtype)
        with open_source(ref.file) as file:
            for start in range(first, stop, height):
                count = min(height, stop - start)
                stored = self._stored[: count * size]
                fill(stored.numpy().data, file, ref.start + start * size, ref.file)
                block = self._block[: count * width].view(count, width)
                yield block.copy_(stored.view(dtype).view(count, width))


class FileWeight(torch.Tensor):
    """A parameter that is in a file until an operation needs its numbers.

    `embedding` reads only the rows it looks up, `linear` goes through the weight block by block; every other
    operation reads all of it. Without a file (a layer that is passed through) all its numbers are NaN, so
    what they reach shows.
    """

    ref: TensorRef | None
    reader: Reader

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], ref: TensorRef | None, reader: Reader) -> FileWeight:
        """Announces shape and dtype; reads nothing."""
        made: FileWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=reader.dtype, device=torch.device("cpu")
        )
        made.ref, made.reader = ref, reader
        made._is_param = True  # what makes it an nn.Parameter for isinstance
        return made

    def read(self) -> Tensor:
        """The whole tensor."""
        if self.ref is None:
            return torch.full((), torch.nan, dtype=self.reader.dtype).expand(self.shape)
        return self.reader(self.ref)

    def row(self, index: int) -> Tensor:
        """One row of a matrix."""
        return self.read()[0] if self.ref is None else self.reader.rows(self.ref, index, index + 1)[0].clone()

    def times(self, given: Tensor) -> Tensor:
        """The linear without bias."""
        if self.ref is None:
            return given.new_full((*given.shape[:-1], self.shape[0]), torch.nan)
        return self.reader.product(given, self.ref)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Lookups and products by parts; the rest goes on to `__torch_dispatch__`."""
        if func is nn.functional.embedding and isinstance(args[1], FileWeight):
            rows, places = args[0].unique(return_inverse=True)
            return torch.stack([args[1].row(row) for row in rows.tolist()])[places]
        if func is nn.functional.linear and isinstance(args[1], FileWeight):
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reads what the operation needs."""

        def filled(value: Any) -> Any:
            return value.read() if isinstance(value, FileWeight) else value

        return func(*tree_map(filled, args), **tree_map(filled, kwargs or {}))


def _linear(given: Tensor, weight: FileWeight, bias: Tensor | None = None) -> Tensor:
    product = weight.times(given)
    if bias is None:
        return product
    return product + (bias.read() if isinstance(bias, FileWeight) else bias)


@torch.no_grad()
def on_demand(
    config: Any,
    tensors: Mapping[str, TensorRef],
    prefix: str,
    reader: Reader,
    passed: Collection[int] = (),
) -> nn.Module:
    """A model in evaluation mode whose parameters are read from files when they are used.

    Args:
        config: Its transformers config.
        tensors: By name in the checkpoint.
        prefix: Under which name the layers are there.
        reader: What its weights are read by.
        passed: Layers that return their input. They still run, so that a cache keeps its places, but all
            their numbers are NaN.

    Raises:
        Unmatched: If a parameter is not in the files in the form it is computed with.
    """
    with init_empty_weights(), no_init_weights():  # not torch's meta device: buffers have numbers
        model = model_class(config)._from_config(copy.deepcopy(config), dtype=reader.dtype).eval()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()  # the buffers
    model.tie_weights()  # which works only outside that context
    view = LayeredModel(model)
    for index in passed:
        view.layers[index] = _passed_through(view.layers[index], reader)
    _fill(model, _Names(tensors, view.family.layers_path, prefix), reader, set(passed))
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
    stored = set(model.state_dict())  # before weights are put in: later it would read them all
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
            made.setdefault(id(parameter), FileWeight(ref.shape, ref, reader))
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


def _passed_through(layer: nn.Module, reader: Reader) -> nn.Module:
    """A layer without numbers that returns its input."""
    bare: Any = copy.deepcopy(layer)  # others may share its parts
    for module in bare.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = FileWeight(tuple(parameter.shape), None, reader)
    bare.forward = returning_input(bare.forward)
    return cast(nn.Module, bare)
