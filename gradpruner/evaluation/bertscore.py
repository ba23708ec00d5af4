"""BERTScore: how close a generated text comes to the right one, by an encoder's embeddings.

Computed by the `bert-score` library. Its own way of loading is not used: it reads pickled weights, takes
every path that contains "t5" for a T5 model, and under transformers 5 asks a RoBERTa tokenizer for a space
before the
first word in a way that is no longer heard. So encoder and tokenizer are loaded here and handed over.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradpruner.errors import ConfigError, ModelError, ShapeError
from gradpruner.models.checking import check_model_folder
from gradpruner.models.folder import locate_model
from gradpruner.provenance import hash_folder

DEFAULT_ENCODER = "roberta-large"
"""The library's choice for English, and the one published figures are made with."""

# The library keeps the embeddings of all texts it is given at a time: 2 x 128 texts of 512 tokens are 0.5 GB
# with an encoder of 1,024 dimensions.
_PAIRS_AT_A_TIME = 128

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


def check_encoder(encoder: str | Path = DEFAULT_ENCODER) -> Path:
    """Makes sure that an encoder can be used, before any other model is loaded.

    Args:
        encoder: A folder, or a hub id, which is then downloaded unless it is in the cache.

    Returns:
        The local folder.

    Raises:
        ConfigError: If the `bert-score` library is not installed.
        ModelError: If there is no such encoder, it is none, has no tokenizer, or its weights are not
            safetensors.
        IntegrityError: If its files are damaged or would run foreign code.
    """
    return _open_encoder(encoder)[0]


def _open_encoder(encoder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of an encoder and its raw config, both checked."""
    if importlib.util.find_spec("bert_score") is None:
        raise ConfigError(
            "Similarity of texts needs the bert-score library, which is not installed.",
            hint="Install it: pip install 'gradpruner[text]'.",
        )
    try:
        folder = locate_model(encoder)
    except ModelError as error:
        raise ModelError(
            f"The encoder for BERTScore is not to be had: {error.message}",
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
        layer: Whose output is compared, counted from 1; 0 is the embeddings. None takes the one the library
            recommends for an encoder of this name, and the last one for encoders it does not know.
        batch_size: Texts per forward pass, at least 1; does not change the scores beyond rounding.
        device: A torch device.

    Raises:
        ConfigError: If the library is missing, or `layer` or `batch_size` is out of range.
        ModelError: See `check_encoder`.
        IntegrityError: See `check_encoder`.
    """

    def __init__(
        self,
        encoder: str | Path = DEFAULT_ENCODER,
        layer: int | None = None,
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"The batch size of BERTScore is {batch_size}; it must be at least 1.")
        self.folder, config = _open_encoder(encoder)
        self.encoder = str(encoder)
        self.batch_size = batch_size
        self.device = device
        self.layer = _choose_layer(config, (self.encoder, self.folder.name), layer)
        self._model, self._tokenizer = _load(self.folder, self.layer, device)

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
        # The library warns for every empty text, and fails on it under transformers 5.
        full = [i for i, pair in enumerate(zip(generated, answers, strict=True)) if all(map(str.strip, pair))]
        scores = [0.0] * len(generated)
        for start in range(0, len(full), _PAIRS_AT_A_TIME):
            chosen = full[start : start + _PAIRS_AT_A_TIME]
            found = self._score([generated[i] for i in chosen], [answers[i] for i in chosen])
            for i, score in zip(chosen, found, strict=True):
                scores[i] = score
        return scores

    def describe(self) -> dict[str, Any]:
        """Returns what the scores depend on, for the record; figures made otherwise cannot be compared."""
        return {
            "implementation": "bert-score",
            "version": importlib.metadata.version("bert-score"),
            "transformers": importlib.metadata.version("transformers"),
            # A folder by its name and its contents: where it lies is nobody's business.
            "encoder": self.folder.name if Path(self.encoder).expanduser().is_dir() else self.encoder,
            "encoder_sha256": hash_folder(sorted(self.folder.glob("*.safetensors"))),
            "layer": self.layer,
            "idf": False,
            "rescaled": False,
        }

    def _score(self, generated: list[str], answers: list[str]) -> list[float]:
        from bert_score.utils import bert_cos_score_idf

        # Every token counts alike but those that only open and close a text.
        weights: defaultdict[int | None, float] = defaultdict(lambda: 1.0)
        weights[self._tokenizer.sep_token_id] = weights[self._tokenizer.cls_token_id] = 0.0
        scores = bert_cos_score_idf(
            self._model, answers, generated, self._tokenizer, weights,
            batch_size=self.batch_size, device=self.device,
        )  # fmt: skip
        f1: list[float] = scores[:, 2].tolist()
        return f1


def _choose_layer(config: dict[str, Any], names: Sequence[str], layer: int | None) -> int:
    """Returns the layer to compare: the one asked for, the library's for one of the names, or the last."""
    num_layers = _num_layers(config)
    assert num_layers is not None
    if layer is None:
        from bert_score.utils import model2layers

        # A folder that carries the name of a known encoder is taken for it, so that a copy scores like it.
        known: list[int] = [model2layers[name] for name in names if name in model2layers]
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
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    config = AutoConfig.from_pretrained(folder)
    positions = getattr(config, "max_position_embeddings", None)
    if layer != config.num_hidden_layers:
        config.num_hidden_layers = layer
    try:
        with _quietly():  # layers left out and a missing pooler are meant
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
    """Keeps transformers' report of the weights it did not need to itself."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
