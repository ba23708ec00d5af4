"""Models that read each weight from its file when it is used, and free it right after.

The model's own forward pass runs, so everything it does between its layers is done here too. Linears are read
block by block, embeddings row by row and other weights whole, so memory does not grow with the number of
layers. Models that share a `Reader` share products: a weight is multiplied with the same numbers only once.
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

_BLOCK_BYTES = 2 << 20  # read of a weight at a time, in the computing dtype: fits into the cache of a core
_PRODUCT_BYTES = 256 << 20  # of cached products; later products are not cached


class Unmatched(Exception):
    """The model cannot run with weights read on demand; it must be loaded whole."""


class Reader:
    """Reads tensors, converts them to the computing dtype, and caches products."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._block = torch.empty(0, dtype=dtype)
        self._stored = torch.empty(0, dtype=torch.uint8)
        self._products: dict[TensorRef, list[tuple[Tensor, Tensor]]] = {}
        self._given = torch.empty(0, dtype=dtype)  # the last cached input, which q, k and v share
        self._left = _PRODUCT_BYTES

    def __call__(self, ref: TensorRef) -> Tensor:
        """Reads a whole tensor into memory of its own."""
        stored = read_tensor(ref)
        return stored.to(self.dtype) if stored.is_floating_point() else stored

    def row(self, ref: TensorRef, index: int) -> Tensor:
        """Reads one row of a matrix."""
        return next(self._blocks(ref, index, index + 1, 1))[0].clone()

    def product(self, given: Tensor, ref: TensorRef) -> Tensor:
        """Returns `given @ weight.T`, from the cache or computed block by block."""
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
        """Yields the rows from `first` to `stop`, `height` at a time; each block is valid until the next."""
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
    """A parameter that stays in its file until an operation needs its numbers.

    `embedding` reads only the rows it looks up, `linear` reads the weight block by block, and every other
    operation reads all of it. A parameter of a passed-through layer has no file: all its numbers are NaN, so
    that any use of them shows in the output.
    """

    ref: TensorRef | None
    reader: Reader

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], ref: TensorRef | None, reader: Reader) -> FileWeight:
        """Makes a tensor with shape and dtype; reads nothing."""
        made: FileWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=reader.dtype, device=torch.device("cpu")
        )
        made.ref, made.reader = ref, reader
        made._is_param = True  # isinstance then takes it for an nn.Parameter
        return made

    def read(self) -> Tensor:
        """Reads the whole tensor."""
        if self.ref is None:
            return torch.full((), torch.nan, dtype=self.reader.dtype).expand(self.shape)
        return self.reader(self.ref)

    def row(self, index: int) -> Tensor:
        """Reads one row of a matrix."""
        return self.read()[0] if self.ref is None else self.reader.row(self.ref, index)

    def times(self, given: Tensor) -> Tensor:
        """Returns `given @ self.T`."""
        if self.ref is None:
            return given.new_full((*given.shape[:-1], self.shape[0]), torch.nan)
        return self.reader.product(given, self.ref)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reads embeddings and linears in parts; hands everything else to `__torch_dispatch__`."""
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
        """Reads the weights that the operation needs."""

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
    """Returns a model in evaluation mode whose parameters are read from their files when they are used.

    Args:
        config: The transformers config of the model.
        tensors: The tensors on disk, by name in the checkpoint.
        prefix: Prefix of the layers' tensor names in the checkpoint.
        reader: Reads the weights.
        passed: Layers that return their input. They still run, so that the cache has an entry for them, but
            all their numbers are NaN.

    Raises:
        Unmatched: If a parameter is not stored in the form that the model uses.
    """
    with init_empty_weights(), no_init_weights():  # unlike torch's meta device, keeps buffers
        model = model_class(config)._from_config(copy.deepcopy(config), dtype=reader.dtype).eval()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()  # the buffers
    model.tie_weights()  # works only outside that context
    view = LayeredModel(model)
    for index in passed:
        view.layers[index] = _passed_through(view.layers[index], reader)
    _fill(model, _Names(tensors, view.family.layers_path, prefix), reader, set(passed))
    return cast(nn.Module, model)


class _Names:
    """Finds parameters of a model on disk, where their names may begin differently."""

    def __init__(self, tensors: Mapping[str, TensorRef], path: str, prefix: str) -> None:
        self.tensors = tensors
        self.layers = path + "."
        end = 0
        while end < min(len(path), len(prefix)) and path[-1 - end] == prefix[-1 - end]:
            end += 1
        self.before, self.after = path[: len(path) - end], prefix[: len(prefix) - end]

    def find(self, name: str) -> TensorRef | None:
        """Returns the tensor on disk of a parameter or buffer in memory; None if there is none."""
        if name.startswith(self.before):
            renamed = self.after + name[len(self.before) :]
            if renamed in self.tensors:
                return self.tensors[renamed]
        return self.tensors.get(name)


def _fill(model: nn.Module, names: _Names, reader: Reader, passed: Collection[int]) -> None:
    """Replaces every parameter by a `FileWeight`, and fills buffers with their stored numbers."""
    passed_prefixes = tuple(f"{names.layers}{index}." for index in passed)
    stored = set(model.state_dict())  # taken before there are FileWeights, which it would read
    weights: dict[int, FileWeight] = {}
    names_on_disk: dict[int, set[str]] = {}
    places = [
        (f"{path}.{key}" if path else key, module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    for name, _, _, parameter in places:
        ref = names.find(name)
        if ref is not None and not name.startswith(passed_prefixes):
            if ref.shape != tuple(parameter.shape) or ref.dtype not in TORCH_DTYPES:
                raise Unmatched(f"'{name}' is stored in a different form than the model uses")
            names_on_disk.setdefault(id(parameter), set()).add(ref.name)
            weights.setdefault(id(parameter), FileWeight(ref.shape, ref, reader))
    for name, module, key, parameter in places:
        if name.startswith(passed_prefixes):
            continue
        if len(names_on_disk.get(id(parameter), ())) > 1:
            raise Unmatched(f"'{name}' is tied to another tensor but stored separately")
        if id(parameter) not in weights:
            raise Unmatched(f"'{name}' is stored under another name")
        module._parameters[key] = weights[id(parameter)]
    for name, buffer in model.named_buffers():
        if name not in stored or name.startswith(passed_prefixes):
            continue  # it is computed, not stored
        ref = names.find(name)
        if ref is None or ref.shape != tuple(buffer.shape) or ref.dtype not in TORCH_DTYPES:
            raise Unmatched(f"'{name}' is stored in a different form than the model uses")
        buffer.copy_(reader(ref))


def _passed_through(layer: nn.Module, reader: Reader) -> nn.Module:
    """Returns a copy of a layer that has no numbers and returns its input."""
    bare: Any = copy.deepcopy(layer)  # other layers may share its parts
    for module in bare.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = FileWeight(tuple(parameter.shape), None, reader)
    bare.forward = returning_input(bare.forward)
    return cast(nn.Module, bare)
