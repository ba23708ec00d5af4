"""BERTScore: how close a generated text comes to the right one, by an encoder's embeddings.

Equal to the `bert-score` library within 1e-6, by test. The library itself is not used: it reads pickled
weights, takes every path that contains "t5" for a T5 model, and under transformers 5 no longer tokenises the
first word of a text for RoBERTa as it did when the published figures were made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradpruner.common.errors import ConfigError, ModelError, ShapeError
from gradpruner.common.provenance import hash_folder
from gradpruner.evaluation.options import DEFAULT_ENCODER
from gradpruner.models.checking import check_model_folder
from gradpruner.models.folder import locate_model

# Layer -> encoders whose published figures compare the output of that layer, by name without organisation:
# where it agrees best with human judgement (Zhang et al., 2020). The library has the same table.
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

_PAIRS_AT_A_TIME = 32
# Without any of them transformers makes up an empty tokenizer, to which every text is the same unknown words.
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
    """Makes sure that an encoder can be used, before any other model is loaded.

    Args:
        encoder: A folder, or a hub id, which is then downloaded unless it is in the cache.

    Returns:
        The local folder, and its raw config.

    Raises:
        ModelError: If there is no such model, it is not an encoder, has no tokenizer, or its weights are not
            safetensors.
        IntegrityError: If its files are damaged or would run foreign code.
    """
    try:
        folder = locate_model(encoder)
    except ModelError as error:
        raise ModelError(
            f"The encoder for BERTScore cannot be found: {error.message}",
            hint="Give a folder that holds one (--set evaluate.encoder=FOLDER), or unset HF_HUB_OFFLINE to "
            "have it downloaded.",
        ) from error
    config = check_model_folder(folder)
    causal = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    if causal or config.get("is_encoder_decoder") or _num_layers(config) is None:
        raise ModelError(
            f"{folder} holds a {config.get('model_type', 'nameless')} model, which is not a plain encoder.",
            hint="Give one of the BERT or RoBERTa kind, e.g. roberta-large.",
        )
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{folder} holds no tokenizer: none of {', '.join(_VOCABULARIES)}.",
            hint="Copy the encoder's tokenizer files beside its weights.",
        )
    return folder, config


class BertScorer:
    """Scores texts by one encoder; the model is loaded when the scorer is made.

    Args:
        encoder: A folder or a hub id.
        layer: Whose output is compared, counted from 1; 0 is the embeddings. None takes the one that
            published figures use for an encoder of this name, and the last one for all others.
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
        """BERTScore F1 of each generated text with its answer: not rescaled, without idf weights.

        Args:
            generated: One text per example.
            answers: The right ones, in the same order.

        Returns:
            At most 1, in practice 0.8 to 1 with RoBERTa; 0 where either text is empty.

        Raises:
            ShapeError: If the two differ in length.

        Source: Zhang et al., "BERTScore: evaluating text generation with BERT", 2020.
        """
        if len(generated) != len(answers):
            raise ShapeError(f"{len(generated)} generated texts and {len(answers)} answers do not pair up.")
        pairs = [(said.strip(), wanted.strip()) for said, wanted in zip(generated, answers, strict=True)]
        # Every pair once, the longest first: if the memory does not suffice, that shows in the first batch.
        full = sorted(
            (pair for pair in dict.fromkeys(pairs) if all(pair)), key=lambda pair: -len("".join(pair))
        )
        scores: dict[tuple[str, str], float] = {}
        for start in range(0, len(full), _PAIRS_AT_A_TIME):
            batch = full[start : start + _PAIRS_AT_A_TIME]
            sides = [self._embed([pair[side] for pair in batch]) for side in (0, 1)]
            scores |= zip(batch, map(_match, *sides), strict=True)
        return [scores.get(pair, 0.0) for pair in pairs]

    def describe(self) -> dict[str, Any]:
        """Returns what the scores depend on, for the record; figures made otherwise cannot be compared."""
        return {
            "implementation": "gradpruner, equal to bert-score 0.3.13",
            "transformers": metadata.version("transformers"),
            # A folder by its name and contents: paths of this machine do not belong in a record.
            "encoder": self.folder.name if Path(self.encoder).expanduser().is_dir() else self.encoder,
            "encoder_sha256": hash_folder(sorted(self.folder.glob("*.safetensors"))),
            "layer": self.layer,
            "idf": False,
            "rescaled": False,
        }

    def _embed(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        """Of every text the unit vectors of its tokens, shape (tokens, hidden), and which tokens count."""
        rows = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            output = self._model(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
        vectors = functional.normalize(output.last_hidden_state, dim=-1)
        # Tokens that only open or close a text may be matched, but their own match does not count.
        ends = [self._tokenizer.cls_token_id, self._tokenizer.sep_token_id]
        known = torch.tensor([token for token in ends if token is not None], device=self.device)
        counts = ~torch.isin(rows.input_ids, known)
        own = rows.attention_mask.bool()
        return [(vectors[row, own[row]], counts[row, own[row]]) for row in range(len(texts))]


def _match(said: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """F1 of greedy matching: every token with the most similar one of the other text."""
    cosines = said[0] @ wanted[0].T
    precision = cosines.amax(dim=1)[said[1]].mean()
    recall = cosines.amax(dim=0)[wanted[1]].mean()
    # Nothing but special tokens: a mean of nothing.
    return float(torch.nan_to_num(2 * precision * recall / (precision + recall), nan=0.0))


def _choose_layer(config: dict[str, Any], names: Sequence[str], layer: int | None) -> int:
    """The layer to compare: the one asked for, the published one for one of the names, or the last."""
    num_layers = _num_layers(config)
    assert num_layers is not None
    if layer is None:
        own = {name.rsplit("/", 1)[-1] for name in names}
        known = [number for number, encoders in _PUBLISHED_LAYERS.items() if own & set(encoders.split())]
        # A model with fewer layers than the published one only shares its name.
        return known[0] if known and known[0] <= num_layers else num_layers
    if not 0 <= layer <= num_layers:
        raise ConfigError(
            f"Layer {layer} of the encoder {names[0]} was asked for; it has {num_layers}.",
            hint=f"Allowed: 0 (embeddings) to {num_layers}.",
        )
    return layer


def _num_layers(config: dict[str, Any]) -> int | None:
    """Returns the depth a raw config names; None if it names none, as those of encoder-decoders do."""
    number = config.get("num_hidden_layers")
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 1 else None


def _load(folder: Path, layer: int, device: str) -> tuple[Any, Any]:
    """Loads the tokenizer, and the encoder up to `layer`, from safetensors only."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    config = AutoConfig.from_pretrained(folder)
    positions = getattr(config, "max_position_embeddings", None)
    if layer != config.num_hidden_layers:
        config.num_hidden_layers = layer
    try:
        with _quietly():  # that layers are left out and the pooler is missing is intended
            model = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer):
            # Published BERTScores tokenise the first word as those inside a sentence.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, add_prefix_space=True)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}",
            hint="It must hold an encoder and its tokenizer, e.g. a copy of roberta-large.",
        ) from error
    if tokenizer.pad_token_id is None:
        raise ModelError(f"The tokenizer in {folder} has no padding token.", hint="Use another encoder.")
    # A tokenizer saved without a maximum says 1e30, which overflows in the Rust tokenizers.
    if positions is not None:
        # RoBERTa counts positions from behind the padding index.
        offset = getattr(getattr(model, "embeddings", None), "padding_idx", None)
        room = positions - (0 if offset is None else offset + 1)
        tokenizer.model_max_length = min(tokenizer.model_max_length, room)
    elif tokenizer.model_max_length > 1_000_000:
        tokenizer.model_max_length = 512
    return model.to(device).eval(), tokenizer


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences transformers' report of the weights it did not need."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
