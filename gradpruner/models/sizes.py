"""What a model costs: parameters, KV cache, operations, disk; and the memory a step took.

Sizes come from the model built on torch's "meta" device, which holds shapes and no numbers: a model
of any size is counted in about a second, without its weights. One multiply-accumulate (MAC) is two
FLOPs. Operations count the linears only; attention scores add a share that grows with the context.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, cast

import psutil
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gradpruner.errors import ModelError, PlanError

# Spellings of the same three facts across model families.
_EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_USED_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
_CACHED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")
_SAMPLE_SECONDS = 0.02


def build_on_meta(config: Any) -> nn.Module:
    """Builds the causal language model a config describes, with shapes but without numbers.

    Args:
        config: A transformers config of any decoder family.

    Raises:
        ModelError: If transformers has no causal language model for it.
    """
    # A copy: building fills in fields such as the attention implementation.
    text = copy.deepcopy(config.get_text_config(decoder=True))
    try:
        with torch.device("meta"):
            if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
                return cast(nn.Module, AutoModelForCausalLM.from_config(text))
            if not hasattr(text, "vocab_size"):
                raise ValueError("it has no vocabulary, so it predicts no tokens")
            return _Decoder(text)
    except ValueError as error:
        raise ModelError(
            f"Cannot size a model of type '{text.model_type}': {str(error).splitlines()[0]}",
            hint="Only decoder-only language models that transformers knows can be used.",
        ) from error


class _Decoder(nn.Module):
    """The decoder of a model that also sees or hears, with a language head: none of its own exists."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.config = text
        self.model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if getattr(text, "tie_word_embeddings", False):
            self.lm_head.weight = self.model.get_input_embeddings().weight

    @property
    def base_model(self) -> nn.Module:
        """As transformers' own models have it: what is below the head."""
        return cast(nn.Module, self.model)

    def get_output_embeddings(self) -> nn.Linear:
        """As transformers' own models have it."""
        return self.lm_head


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder layers in order.

    They are the longest `nn.ModuleList` whose elements share one class; a list as long as the
    config's `num_hidden_layers` wins over a longer one (vision towers and experts are lists too).

    Raises:
        ModelError: If the model has no such list.
    """
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(element) for element in module}) == 1
    ]
    if not lists:
        raise ModelError(
            f"No list of decoder layers found in {type(model).__name__}.",
            hint="Depth pruning needs a model made of a row of equal layers.",
        )
    config: Any = getattr(model, "config", None)
    text = None if config is None else config.get_text_config(decoder=True)
    expected = getattr(text, "num_hidden_layers", None)
    return max(lists, key=lambda layers: (len(layers) == expected, len(layers)))


def count_parameters(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters; one shared by two places (tied embeddings) counts once.

    Args:
        module: A model or a part of one.
        trainable_only: Count only parameters that require a gradient.
    """
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if parameter.requires_grad or not trainable_only
    )


def layer_parameters(model_or_config: Any) -> list[int]:
    """Number of parameters of each decoder layer, in order."""
    return [count_parameters(layer) for layer in decoder_layers(_as_model(model_or_config))]


def decoder_parameters(model_or_config: Any) -> int:
    """Number of parameters in all decoder layers: everything but embeddings, last norm and head."""
    return sum(layer_parameters(model_or_config))


def macs_linear(model_or_config: Any, *, tokens: int = 128, lm_head: bool = False) -> int:
    """Multiply-accumulates of the linears when `tokens` tokens pass through the model once.

    Of a mixture of experts only the experts that a token is sent to count.

    Args:
        model_or_config: A transformers model, or a config (then sized without weights).
        tokens: Number of tokens, over the whole batch.
        lm_head: Also count the projection to the vocabulary, for every token.

    Source: GradPruner, Table 11 (128 tokens, no head): 893.353 GMAC for the 32 layers of
        Llama-3.1-8B and
    530.428 GMAC for 19 of them.
    """
    model = _as_model(model_or_config)
    macs = sum(_layer_macs(layer, model) for layer in decoder_layers(model))
    return tokens * (macs + (_head_macs(model) if lm_head else 0))


def flops_per_token(model_or_config: Any) -> int:
    """FLOPs of the linears, head included, to push one token through the model."""
    return 2 * macs_linear(model_or_config, tokens=1, lm_head=True)


def kv_bytes_per_token(
    config: Any, dtype: torch.dtype | None = None, *, keep: Sequence[int] | None = None
) -> int:
    """Bytes the key-value cache grows by with every token of context.

    Sliding-window layers count in full (they stop growing at the window); layers without a cache
    (linear attention, state space) count nothing; latent attention counts its compressed entry.

    Args:
        config: A transformers config.
        dtype: Type of the cache; None for the checkpoint's.
        keep: Indices of the layers to count; None for all.
    """
    text = config.get_text_config(decoder=True)
    layers = range(text.num_hidden_layers) if keep is None else keep
    entries = sum(_kv_entries(text, layer) for layer in layers)
    return entries * _dtype_of(text, dtype).itemsize


def disk_bytes(model_or_config: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights in a checkpoint; tied weights are stored once.

    Args:
        model_or_config: A transformers model, or a config.
        dtype: Type they are stored in; None for the one the config names, float32 if it names none.
    """
    model = _as_model(model_or_config)
    return count_parameters(model) * _dtype_of(model.config, dtype).itemsize


def savings(
    config: Any, keep: Sequence[int], *, dtype: torch.dtype | None = None
) -> dict[str, dict[str, int]]:
    """What keeping only some layers saves; layers may differ in size.

    A layer merged into another costs nothing: it counts as removed.

    Args:
        config: Config of the dense model.
        keep: Indices of the layers that stay, ascending, each in [0, num_layers).
        dtype: Type of weights and cache; None for the checkpoint's.

    Returns:
        `{"before", "after"}` of "layers", "decoder_parameters", "parameters", "kv_bytes_per_token",
        "flops_per_token" and "disk_bytes".

    Raises:
        PlanError: If `keep` is empty, not ascending, repeats a layer or leaves the range.
    """
    model = build_on_meta(config)
    layers = decoder_layers(model)
    _check_keep(keep, len(layers))
    dropped = sorted(set(range(len(layers))) - set(keep))
    parameters = count_parameters(model)
    per_layer = [count_parameters(layer) for layer in layers]
    flops = flops_per_token(model)
    gone_parameters = sum(per_layer[layer] for layer in dropped)
    gone_flops = 2 * sum(_layer_macs(layers[layer], model) for layer in dropped)
    itemsize = _dtype_of(model.config, dtype).itemsize
    return {
        "layers": _change(len(layers), len(keep)),
        "decoder_parameters": _change(sum(per_layer), sum(per_layer) - gone_parameters),
        "parameters": _change(parameters, parameters - gone_parameters),
        "kv_bytes_per_token": _change(
            kv_bytes_per_token(config, dtype), kv_bytes_per_token(config, dtype, keep=keep)
        ),
        "flops_per_token": _change(flops, flops - gone_flops),
        "disk_bytes": _change(parameters * itemsize, (parameters - gone_parameters) * itemsize),
    }


class PeakMemory:
    """Measures the peak memory of this process between entry and exit of a `with` block.

    On CUDA: the most bytes torch had allocated at once, summed over all visible devices; exact.
    Blocks may be nested, the outer one sees the peaks of the inner ones.
    Elsewhere: the resident set size (RSS) of the process, sampled every 20 ms and at both ends, so
        a
    shorter spike can be missed. RSS holds everything in the process: Python, libraries (some 400 MB
    for torch alone), the models of earlier steps the allocator has not given back, files mapped and
    read.

    Args:
        device: Where the work happens; None or anything but CUDA measures RSS.

    Attributes:
        kind: "cuda" or "rss".
        peak_bytes: The absolute peak; for run.json.
        rise_bytes: Peak minus what was in use at entry, >= 0.
    """

    _open_on_cuda: ClassVar[list[PeakMemory]] = []

    def __init__(self, device: torch.device | str | None = None) -> None:
        on_cuda = device is not None and torch.device(device).type == "cuda"
        self.kind = "cuda" if on_cuda else "rss"
        self.peak_bytes = 0
        self.rise_bytes = 0
        self._at_entry = 0
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None
        self._process = psutil.Process()

    def __enter__(self) -> PeakMemory:
        if self.kind == "cuda":
            self._enter_cuda()
        else:
            self._at_entry = self.peak_bytes = self._process.memory_info().rss
            self._sampler = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self._note(self._process.memory_info().rss)
        else:
            PeakMemory._open_on_cuda.remove(self)
            self._note(_cuda_peak())

    def _enter_cuda(self) -> None:
        """Starts a fresh peak, after saving the one so far for the blocks around this one."""
        for outer in PeakMemory._open_on_cuda:
            outer._note(_cuda_peak())
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        self._at_entry = self.peak_bytes = _cuda_peak()
        PeakMemory._open_on_cuda.append(self)

    def _sample(self) -> None:
        """Runs in the sampling thread until told to stop."""
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._note(self._process.memory_info().rss)

    def _note(self, in_use_bytes: int) -> None:
        """Takes one reading into account."""
        self.peak_bytes = max(self.peak_bytes, in_use_bytes)
        self.rise_bytes = self.peak_bytes - self._at_entry


def _cuda_peak() -> int:
    """Returns the peak since the last reset, summed over the devices."""
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.max_memory_allocated(index) for index in devices)


def _as_model(model_or_config: Any) -> Any:
    """Returns the model itself, or the one a config describes, on meta."""
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    return build_on_meta(model_or_config)


def _change(before: int, after: int) -> dict[str, int]:
    """Returns one entry of `savings`."""
    return {"before": before, "after": after}


def _check_keep(keep: Sequence[int], num_layers: int) -> None:
    """Refuses a keep-set that does not fit a model of `num_layers` layers."""
    if list(keep) != sorted(set(keep)) or not keep or keep[0] < 0 or keep[-1] >= num_layers:
        raise PlanError(
            f"Cannot keep the layers {list(keep)} of a model with {num_layers} layers.",
            hint=f"Give at least one index, ascending and without repeats, in 0..{num_layers - 1}.",
        )


def _dtype_of(config: Any, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the given dtype, else the one a config names, else float32."""
    named = dtype if dtype is not None else getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named.removeprefix("torch."), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _first_field(config: Any, names: Sequence[str]) -> int | None:
    """Returns the first of the fields that the config has and that is a number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _layer_macs(layer: nn.Module, model: Any) -> int:
    """Returns the multiply-accumulates of one layer's linears for one token."""
    config = model.config.get_text_config(decoder=True)
    experts = _first_field(config, _EXPERT_COUNT_FIELDS)
    used = _first_field(config, _EXPERTS_USED_FIELDS) or 1
    return sum(_module_macs(module, experts, used) for module in _modules(layer))


def _modules(layer: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules of a layer that hold weights of their own, adapters left out."""
    for name, module in layer.named_modules():
        if ".lora_" not in name:
            yield module


def _module_macs(module: nn.Module, experts: int | None, used: int) -> int:
    """Returns the multiply-accumulates of one module, without its children, for one token."""
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    macs = 0
    for parameter in module.parameters(recurse=False):
        if experts is None or parameter.ndim < 2 or parameter.shape[0] != experts:
            continue
        # transformers keeps all experts of a layer in one (experts, out, in) tensor, and the router
        # that chooses among them as (experts, in): neither is an nn.Linear.
        share = used if parameter.ndim == 3 else experts
        macs += parameter.numel() // experts * share
    return macs


def _head_macs(model: Any) -> int:
    """Returns the multiply-accumulates of the projection to the vocabulary for one token."""
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def _kv_entries(config: Any, layer: int) -> int:
    """Returns how many numbers one layer caches per token."""
    types = getattr(config, "layer_types", None)
    if types and types[layer] not in _CACHED_LAYER_TYPES:
        return 0
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return int(latent) + int(getattr(config, "qk_rope_head_dim", 0))
    heads = _at_layer(config.num_attention_heads, layer)
    kv_heads = _at_layer(getattr(config, "num_key_value_heads", None), layer) or heads
    head_dim = _at_layer(getattr(config, "head_dim", None), layer) or config.hidden_size // heads
    return 2 * int(kv_heads) * int(head_dim)


def _at_layer(value: Any, layer: int) -> Any:
    """Returns a config value at one layer: some families give one per layer."""
    return value[layer] if isinstance(value, list | tuple) else value
