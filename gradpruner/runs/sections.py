"""The sections of a recipe: every key with its default, its limits and what it means.

Those of training (record, finetune, distil) are in `training.options`. Importing this imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from gradpruner.evaluation.options import AskingSection
from gradpruner.plans.defaults import DENSITY, NUM_MERGE, PROTECT_FIRST
from gradpruner.training.options import Section

if TYPE_CHECKING:
    from torch import nn

BUDGETS = ("num_prune", "layer_fraction", "parameter_fraction", "layers", "max_loss")
"""Keys of the plan section of which one at most says how much goes."""


class ModelSection(Section):
    """Which model, and how it is loaded."""

    path: str = Field(min_length=1)
    """Folder of a Hugging Face model, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype weights are loaded in; auto: bfloat16 on GPUs that have it, float32 elsewhere."""
    device: str = "auto"
    """"auto" (a GPU when there is one), "cpu", "cuda"."""
    attn_implementation: str | None = None
    """"sdpa", "eager", "flash_attention_2"; null leaves it to transformers."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def load(self, folder: Path, *, dtype: str | None = None, quantise: bool = False) -> nn.Module:
        """A model folder, loaded as this section says but for what is given."""
        from gradpruner.models.loading import load_model

        return load_model(
            folder,
            dtype=dtype or self.dtype,
            device=self.device,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            quantise=quantise,
        )

    def trained_dtype(self, mode: str) -> str | None:
        """Dtype that a model is loaded in to be trained in a mode of fine-tuning; None: as always."""
        # AdamW's updates are far below the resolution of bfloat16: weights that train are float32.
        return "float32" if mode == "full" and self.dtype == "auto" else None


class DataSection(Section):
    """The downstream task: files of your own, or a named task."""

    train: str | None = None
    """File, folder or hub dataset to fine-tune on; "path#N" samples N rows. JSONL, JSON, CSV, parquet."""
    eval: str | None = None
    """The same, to evaluate on. null: the split of that folder or hub dataset; where it has none, a tenth of
    the training rows, 1,000 at most, is held out and not trained on."""
    task: str | None = None
    """A named task (`gradpruner ls tasks`) instead of files."""
    folder: str | None = None
    """Local folder with the named task's splits; null reads the hub dataset."""
    format: Literal["auto", "prompt_completion", "alpaca", "sharegpt", "messages", "labelled_text"] = "auto"
    """Row format; auto looks at the first rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What your own columns are called: {prompt: question, completion: answer, system: instructions}."""
    prompt: str | None = Field(default=None, min_length=1)
    """The prompt as text with columns in braces: "Question: {question}\\nAnswer:"."""
    completion: str | None = Field(default=None, min_length=1)
    """The answer in the same way: " {answer}"."""
    labels: list[str] | dict[int | str, str] | None = Field(default=None, min_length=2)
    """Names of numbered labels: a list counted from 0, or a mapping {0: negative, 1: positive}."""
    train_limit: int | None = Field(default=None, ge=1)
    """Use this many randomly chosen training rows; null: all, or the paper's number for a named task."""
    eval_limit: int | None = Field(default=None, ge=1)
    """Evaluate on this many randomly chosen rows."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Ask a named task through the tokenizer's chat template; auto: where it has one."""
    chat_template: str | None = None
    """For conversations and models without a chat template: chatml, llama3, mistral, gemma, or a Jinja file.
    It is saved with the tokenizer of tuned models. null: the tokenizer's own."""
    validation: str | None = None
    """Rows on which choices are made: how many layers go (plan.max_loss), which row the report names to ship.
    null: only plan.max_loss and recover need some, and hold them out of the training rows."""
    validation_limit: int = Field(default=500, ge=1)
    """Validation rows at most; held out, they are at most a fifth of the training rows, a tenth and 200 where
    only a recovery is chosen by them."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens per sample; longer prompts are cut from the left."""
    skip_bad: bool = False
    """Drop unusable rows (counted in the report) instead of stopping."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.task is None and self.train is None:
            raise ValueError("give data.train, or data.task")
        if self.task is not None and (self.train is not None or self.eval is not None):
            raise ValueError("data.task and data.train / data.eval exclude each other")
        own = [name for name in ("columns", "prompt", "completion", "labels") if getattr(self, name)]
        if self.task is not None and own:
            raise ValueError(f"data.task knows its columns: data.{own[0]} is for rows of your own")
        if self.format != "auto" and (self.prompt or self.completion):
            raise ValueError("data.format and data.prompt / data.completion exclude each other")
        return self


class ScoreSection(Section):
    """How recorded energy becomes a score."""

    norm: Literal["squared", "frobenius"] = "squared"
    """squared: mean squared simulated gradient (paper). frobenius: sum of norms (released code)."""


class PlanSection(Section):
    """How many layers go, which may not, and how merged ones are combined."""

    file: str | None = None
    """Use this plan file (from `gradpruner plan`, perhaps edited) for merged and dropped."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]{0,59}$")
    """What this plan is called: its results are in variants/<row>@<name>. null: the first plan in a run
    directory needs no name, further ones are called after what differs. Holds for one start."""
    num_prune: int | None = Field(default=None, ge=0)
    """Layers to prune. Give one budget only; without any, 40 % of the layers."""
    layer_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of the layers to prune."""
    parameter_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of all parameters to remove."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Prune exactly these layers."""
    max_loss: float | None = Field(default=None, gt=0, lt=1)
    """Prune as many layers as lose at most this share of the dense model's score, certified on validation
    rows before any recovery: 0.01 allows 1 %. Needs start: tuned or given."""
    confidence: float = Field(default=0.9, gt=0.5, lt=1)
    """Probability with which the loss is within max_loss."""
    unit: Literal["parameters", "decoder_parameters"] = "parameters"
    """What methods that prune no whole layers remove as much of as the layers hold: parameters of the whole
    model, or without embeddings and head."""
    num_merge: int = Field(default=NUM_MERGE, ge=0)
    """How many of the pruned layers, the best-scored, are merged instead of dropped."""
    protect_first: int = Field(default=PROTECT_FIRST, ge=0)
    """Layers at the input never pruned; 1 by default, so that every merged layer has one before it."""
    protect_last: int = Field(default=0, ge=0)
    """Layers at the output never pruned."""
    protect: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Further layers that are never pruned."""
    portable_to: list[Literal["vllm", "sglang", "llama.cpp"]] = Field(default_factory=list)
    """Engines that must serve the pruned model right: restricts which layers may go where an engine tells
    their kind by counting (Gemma 2 and 3, gpt-oss, Cohere 2, Llama 4, SmolLM3 ...)."""
    contiguous: bool = False
    """Prune one block of neighbouring layers."""
    target: Literal["preceding", "nearest"] = "preceding"
    """Retained layer a merged one goes into."""
    rule: Literal["sum", "mean", "fisher", "weighted_average", "norm_preserving"] = "sum"
    """Combine rule (`gradpruner ls rules`)."""
    density: float = Field(default=DENSITY, gt=0, le=1)
    """Fraction of a merged layer's entries kept; 0.2 is the paper's 80 % sparsity."""
    repair: Literal["auto", "none", "linear", "least_squares", "layer_wise"] = "none"
    """Refit the last linear before every cut so that the layers behind see what they saw before: a map of the
    hidden size (linear), or the linear itself (least_squares), or that of every layer behind the first cut
    (layer_wise). Looks at training samples. auto: layer_wise for a tuned model, least_squares before tuning
    (start: base); none where a model cannot be repaired (mixture of experts, quantised)."""
    repair_rows: int | None = Field(default=None, ge=2)
    """Training samples a repair is fitted on, at most; null: as many as determine it well, 512 at least."""
    repair_answers: float | None = Field(default=None, ge=0, lt=1)
    """Share of a repair's weight that positions before answer tokens have at least; 0: all alike. null:
    0.8 where a tuned model is pruned, 0 before tuning (start: base)."""

    @model_validator(mode="after")
    def _one_budget(self) -> PlanSection:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are all budgets; give one")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError("layers lists a layer more than once")
        return self


class RecoverSection(Section):
    """Training after pruning a model that is tuned already (start: tuned or given)."""

    epochs: float = Field(default=0.0, ge=0)
    """Passes over the training data; 0: the pruned model stays as it is."""
    steps: int | None = Field(default=None, ge=0)
    """Optimizer steps instead; 0: none."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null: half of that at which the dense model is tuned, or
    would be by default; with start: given finetune.learning_rate, if set."""
    keep_better: bool = True
    """Keep the trained model only if its loss on validation rows is lower than before, else the pruned one.
    The rows are data.validation, or are held out of the training rows. false: the trained one, always."""

    @property
    def trains(self) -> bool:
        """Whether the pruned model is trained at all."""
        return self.epochs > 0 if self.steps is None else self.steps > 0


class AlsoSection(Section):
    """A further task every variant is measured on, without being trained on it."""

    task: str
    """A named task (`gradpruner ls tasks`)."""
    folder: str | None = None
    """Local folder with its splits; null reads the hub dataset."""
    limit: int | None = Field(default=None, ge=1)
    """Evaluate on this many randomly chosen rows."""


class EvaluateSection(AskingSection):
    """How variants are measured."""

    also: list[AlsoSection] = Field(default_factory=list)
    """Further tasks to measure the fine-tuned variants on: transfer, or a reasoning probe (gsm8k)."""
    lm_eval: list[str] = Field(default_factory=list)
    """Tasks of lm-evaluation-harness to measure the fine-tuned variants on."""
    lm_eval_folder: str | None = None
    """Folder with lm-eval task files of your own."""
    lm_eval_limit: int | None = Field(default=None, ge=1)
    """Examples of every lm-eval task; null takes all."""
    before_finetuning: bool = True
    """Also measure every variant before fine-tuning."""
