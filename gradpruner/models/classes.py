"""Finds the transformers class for a config, and refuses models that are not causal language models."""

from __future__ import annotations

from typing import Any

from gradpruner.common.errors import ModelError

# Endings of class names of models that generate text; all others are refused.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Ending of a class name -> what such a model is.
_OTHERS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForRewardModel": "a reward model",
    "RewardModel": "a reward model",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMaskedLM": "an encoder",
    "Model": "a model without a language head, as embedding models are",
}


def model_class(config: Any) -> Any:
    """Returns the class that loads a config: the architecture it names, else the causal LM of its type.

    Raises:
        ModelError: If transformers has no such class.
    """
    import transformers

    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    if getattr(config, "is_encoder_decoder", False):
        raise _no_decoder(config, "an encoder with a decoder")
    usable = [name for name in names if name.endswith(_DECODERS)]
    if names and not usable:
        what = next((what for end, what in _OTHERS.items() if names[0].endswith(end)), "no language model")
        raise _no_decoder(config, f"{what} ({names[0]})")
    for name in usable:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    try:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise _no_decoder(config, "of another kind") from None


def _no_decoder(config: Any, what: str) -> ModelError:
    return ModelError(
        f"The '{config.model_type}' model is {what}; transformers has no causal language model for it.",
        hint="Only decoder-only language models (architectures: ...ForCausalLM) can be used: give the model "
        "this one was made from.",
    )
