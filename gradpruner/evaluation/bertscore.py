"""BERTScore: similarity of a generated text and the right answer, from an encoder's token embeddings.

A test checks that the scores equal those of the `bert-score` library within 1e-6. The library itself is not
used, for three reasons: it reads pickled weights, it takes every path that contains "t5" for a T5 model, and
under transformers 5 it tokenises the first word of a text for RoBERTa differently from the published figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradpruner.common.errors import ConfigError, ModelError
from gradpruner.common.provenance import hash_folder
from gradpruner.evaluation.options import DEFAULT_ENCODER
from gradpruner.models.checking import check_model_folder
from gradpruner.models.folder import locate_model
from gradpruner.models.loading import quietly

# Layer -> names (without organisation) of the encoders whose published figures use the output of that layer,
# because it agrees best with human judgement (Zhang et al., 2020). The library has the same table.
_PUBLISHED_LAYERS = {
    5: "distilroberta-base",
    7: "longformer-base-4096",
    8: "bert-base-chinese scibert_scivocab_uncased mpnet-base spanbert-base-cased albert-xxlarge-v2",
    9: "bert-base-uncased bert-base-multilingual-cased scibert_scivocab_cased albert-base-v2 "
    "xlm-roberta-base electra-base-discriminator bertweet-base deberta-base deberta-base-mnli",
    10: "roberta-base finbert bigbird-roberta-base deberta-v2-xlarge deberta-v3-xsmall "
    "sup-simcse-bert-base-uncased sup-simcse-roberta-base",
    14: "albert-large-v2 electra-large-discriminator longformer-large-4096 bigbird-roberta-large",
    16: "deberta-large sup-simcse-roberta-large",
    17: "roberta-large xlm-roberta-large spanbert-large-cased deberta-v2-xlarge-mnli",
    18: "bert-large-uncased deberta-large-mnli deberta-xlarge sup-simcse-bert-large-uncased",
    19: "roberta-large-mnli",
    21: "deberta-v2-xxlarge",
    22: "deberta-v2-xxlarge-mnli",
    40: "deberta-xlarge-mnli",
}

_PAIRS_PER_BATCH = 32
# Without any of these files transformers builds an empty tokenizer, to which every word is unknown.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)


def check_encoder(encoder: str | Path = DEFAULT_ENCODER) -> tuple[Path, dict[str, Any]]:
    """Checks that an encoder can be used; called before any other model is loaded.

    Args:
        encoder: A folder, or a hub id. A hub model that is not in the cache is downloaded.

    Returns:
        The encoder's local folder and its raw config.

    Raises:
        ModelError: If the model does not exist, is not an encoder, has no tokenizer, or its weights are not
            safetensors.
        IntegrityError: If its files are damaged or would run code that comes with the model.
    """
    try:
        folder = locate_model(encoder)
    except ModelError as error:
        raise ModelError(
            f"The encoder for BERTScore cannot be found: {error.message}",
            hint="Give the folder of an encoder (--set evaluate.encoder=FOLDER), or unset HF_HUB_OFFLINE to "
            "download it.",
        ) from error
    config = check_model_folder(folder)
    causal = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    if causal or config.get("is_encoder_decoder") or _num_layers(config) is None:
        raise ModelError(
            f"{folder} holds a {config.get('model_type', 'nameless')} model, but BERTScore needs an encoder.",
            hint="Give an encoder-only model of the BERT or RoBERTa kind, e.g. roberta-large.",
        )
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{folder} holds no tokenizer: none of {', '.join(_VOCABULARIES)}.",
            hint="Copy the encoder's tokenizer files into this folder.",
        )
    return folder, config


class BertScorer:
    """Scores texts with one encoder, which is loaded when the scorer is created.

    Args:
        encoder: A folder or a hub id.
        layer: Layer whose output is compared, counted from 1; 0 is the embeddings. None takes the layer that
            published figures use for an encoder of this name, or the last layer if there are none.
        device: A torch device; None takes a GPU if there is one.

    Raises:
        ConfigError: If `layer` is out of range.
        ModelError: See `check_encoder`.
        IntegrityError: See `check_encoder`.
    """

    def __init__(
        self, encoder: str | Path = DEFAULT_ENCODER, layer: int | None = None, device: str | None = None
    ) -> None:
        self.folder, config = check_encoder(encoder)
        self.encoder = str(encoder)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.layer = _choose_layer(config, (self.encoder, self.folder.name), layer)
        self._model, self._tokenizer = _load(self.folder, self.layer, self.device)

    def f1(self, generated: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Returns the BERTScore F1 of each generated text against its answer, not rescaled and without idf.

        Args:
            generated: One text per example.
            answers: The right answers, in the same order.

        Returns:
            One score per example, at most 1 and with RoBERTa usually above 0.8; 0 if either text is empty.

        Source: Zhang et al., "BERTScore: evaluating text generation with BERT", 2020.
        """
        pairs = [(text.strip(), answer.strip()) for text, answer in zip(generated, answers, strict=True)]
        # Each distinct pair once, longest first, so that running out of memory happens in the first batch.
        distinct = sorted(
            (pair for pair in dict.fromkeys(pairs) if all(pair)), key=lambda pair: -len("".join(pair))
        )
        scores: dict[tuple[str, str], float] = {}
        for start in range(0, len(distinct), _PAIRS_PER_BATCH):
            batch = distinct[start : start + _PAIRS_PER_BATCH]
            sides = [self._embed([pair[side] for pair in batch]) for side in (0, 1)]
            scores |= zip(batch, map(_match, *sides), strict=True)
        return [scores.get(pair, 0.0) for pair in pairs]

    def describe(self) -> dict[str, Any]:
        """Returns what the scores depend on, for run.json; scores are comparable only if all of it agrees."""
        return {
            "implementation": "gradpruner, equal to bert-score 0.3.13",
            "transformers": metadata.version("transformers"),
            # Of a folder only the name, so that no path of this machine ends up in the record.
            "encoder": self.folder.name if Path(self.encoder).expanduser().is_dir() else self.encoder,
            "encoder_sha256": hash_folder(sorted(self.folder.glob("*.safetensors"))),
            "layer": self.layer,
            "idf": False,
            "rescaled": False,
        }

    def _embed(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        """Returns, per text, the unit vectors of its tokens, (tokens, hidden), and which tokens count."""
        rows = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            output = self._model(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
        vectors = functional.normalize(output.last_hidden_state, dim=-1)
        # Other tokens may match CLS and SEP, but their own best match is left out of the means.
        ends = [self._tokenizer.cls_token_id, self._tokenizer.sep_token_id]
        uncounted = torch.tensor([token for token in ends if token is not None], device=self.device)
        counts = ~torch.isin(rows.input_ids, uncounted)
        not_padding = rows.attention_mask.bool()
        return [(vectors[row, mask], counts[row, mask]) for row, mask in enumerate(not_padding)]


def _match(generated: tuple[Tensor, Tensor], answer: tuple[Tensor, Tensor]) -> float:
    """Returns the F1 of greedy matching, where each token takes the most similar token of the other text."""
    cosines = generated[0] @ answer[0].T
    precision = cosines.amax(dim=1)[generated[1]].mean()
    recall = cosines.amax(dim=0)[answer[1]].mean()
    # The mean is NaN if a text consists of special tokens only.
    f1 = float(torch.nan_to_num(2 * precision * recall / (precision + recall), nan=0.0))
    return min(f1, 1.0)  # rounding can take it above


def _choose_layer(config: dict[str, Any], names: Sequence[str], layer: int | None) -> int:
    """Returns `layer` if given, else the published layer for one of the names, else the last layer."""
    num_layers = _num_layers(config)
    assert num_layers is not None
    if layer is None:
        own = {name.rsplit("/", 1)[-1] for name in names}
        known = [number for number, encoders in _PUBLISHED_LAYERS.items() if own & set(encoders.split())]
        # With fewer layers than the published encoder, this is another model of the same name.
        return known[0] if known and known[0] <= num_layers else num_layers
    if not 0 <= layer <= num_layers:
        raise ConfigError(
            f"Layer {layer} of the encoder {names[0]} was asked for, which has {num_layers} layers.",
            hint=f"Give 0 (the embeddings) to {num_layers}.",
        )
    return layer


def _num_layers(config: dict[str, Any]) -> int | None:
    """Returns the number of layers in a raw config; None without one, as for some encoder-decoders."""
    number = config.get("num_hidden_layers")
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 1 else None


def _load(folder: Path, layer: int, device: str) -> tuple[Any, Any]:
    """Loads the encoder up to `layer`, from safetensors only, and its tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    config = AutoConfig.from_pretrained(folder)
    positions = getattr(config, "max_position_embeddings", None)
    if layer != config.num_hidden_layers:
        config.num_hidden_layers = layer
    try:
        with quietly():  # transformers would warn of layers left out and of a missing pooler: both intended
            model = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer):
            # Published BERTScores tokenise the first word like a word inside a sentence.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, add_prefix_space=True)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}",
            hint="The folder must hold an encoder and its tokenizer, e.g. a copy of roberta-large.",
        ) from error
    if tokenizer.pad_token_id is None:
        raise ModelError(f"The tokenizer in {folder} has no padding token.", hint="Use another encoder.")
    # A tokenizer saved without a maximum length reports 1e30, which overflows in the Rust tokenizers.
    if positions is not None:
        # RoBERTa's positions start after the padding index.
        offset = getattr(getattr(model, "embeddings", None), "padding_idx", None)
        room = positions - (0 if offset is None else offset + 1)
        tokenizer.model_max_length = min(tokenizer.model_max_length, room)
    elif tokenizer.model_max_length > 1_000_000:
        tokenizer.model_max_length = 512
    return model.to(device).eval(), tokenizer
