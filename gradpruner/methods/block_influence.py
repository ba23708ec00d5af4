"""Block influence (ShortGPT): how much a layer turns the hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradpruner.family import LayeredModel
from gradpruner.methods.base import METHODS, Method, MethodContext
from gradpruner.scores import LayerScores

MAX_SAMPLES = 256
BATCH_SIZE = 16


@torch.inference_mode()
def score(context: MethodContext) -> LayerScores:
    """`BI_l = mean over tokens of 1 - cos(x_l, x_{l+1})`, x the input and output of layer l.

    Inputs and outputs are read at the layers themselves: `hidden_states[-1]` of transformers comes
    after the final norm and would compare the last layer's raw state with a normed one. Calibrated on
    the first 256 training samples, padding left out.

    Source: ShortGPT (Men et al., 2025), Block Influence.
    """
    view = LayeredModel(context.model())
    device = next(view.model.parameters()).device
    turned_L = torch.zeros(view.num_layers, dtype=torch.float64)
    mask: Tensor
    num_tokens = 0

    def measure(index: int, before: Tensor, after: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        turned_L[index] += float((1 - cosine)[mask].double().sum())

    handles = [
        layer.register_forward_hook(_hook(index, measure), with_kwargs=True)
        for index, layer in enumerate(view.layers)
    ]
    samples = [context.samples[i] for i in range(min(MAX_SAMPLES, len(context.samples)))]
    try:
        for start in range(0, len(samples), BATCH_SIZE):
            batch = context.collator(samples[start : start + BATCH_SIZE])
            mask = batch["attention_mask"].bool().to(device)
            num_tokens += int(mask.sum())
            view.model(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    evidence = {"num_layers": view.num_layers, "samples": len(samples), "tokens": num_tokens}
    return LayerScores("block_influence", tuple((turned_L / num_tokens).tolist()), evidence=evidence)


def _hook(index: int, measure: Any) -> Any:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        measure(index, before, output[0] if isinstance(output, tuple) else output)

    return hook


METHODS.register("block_influence")(
    Method("ShortGPT's block influence: how much a layer turns the hidden state", score)
)
