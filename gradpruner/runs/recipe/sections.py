"""The sections of a recipe: every key with its default, its limits and its meaning.

The training sections (record, finetune, distil) are in `training.options`, and most of plan is in
`plans.options`. Importing this module imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from gradpruner.common.options import Section
from gradpruner.evaluation.options import AskingSection
from gradpruner.plans.options import BUDGETS, PlanOptions, RepairKind

if TYPE_CHECKING:
    from torch import nn


class ModelSection(Section):
    """The model, and how it is loaded."""

    path: str = Field(min_length=1)
    """Folder of a Hugging Face model, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the loaded weights; auto: bfloat16 on GPUs that have it, float32 elsewhere."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda"."""
    attn_implementation: str | None = None
    """"sdpa", "eager", "flash_attention_2"; null lets transformers choose."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def load(self, folder: Path, *, dtype: str | None = None, quantise: bool = False) -> nn.Module:
        """Loads a model folder as this section says; a `dtype` replaces the section's."""
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
        """Returns the dtype to load a model in for a mode of fine-tuning; None for the usual one."""
        # AdamW's updates are far below the resolution of bfloat16, so weights that train are float32.
        return "float32" if mode == "full" and self.dtype == "auto" else None


class DataSection(Section):
    """The downstream task: files of your own, or a named task."""

    train: str | None = None
    """File, folder or hub dataset to fine-tune on: JSONL, JSON, CSV, parquet. "path#N" samples N rows."""
    eval: str | None = None
    """The same, to evaluate on. null: the evaluation split of data.train, if that is a folder or hub dataset
    with one; else a tenth of the training rows, 1,000 at most, is held out and not trained on."""
    task: str | None = None
    """A named task (`gradpruner ls tasks`) instead of files."""
    folder: str | None = None
    """Local folder with the splits of the named task; null reads the hub dataset."""
    format: Literal["auto", "prompt_completion", "alpaca", "sharegpt", "messages", "labelled_text"] = "auto"
    """Format of the rows; auto detects it from the first rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of your own columns: {prompt: question, completion: answer, system: instructions}."""
    prompt: str | None = Field(default=None, min_length=1)
    """Template of the prompt, with columns in braces: "Question: {question}\\nAnswer:"."""
    completion: str | None = Field(default=None, min_length=1)
    """Template of the answer: " {answer}"."""
    labels: list[str] | dict[int | str, str] | None = Field(default=None, min_length=2)
    """Names of numbered labels: a list that counts from 0, or a mapping {0: negative, 1: positive}."""
    train_limit: int | None = Field(default=None, ge=1)
    """Train on this many randomly chosen rows; null: all, or the paper's number for a named task."""
    eval_limit: int | None = Field(default=None, ge=1)
    """Evaluate on this many randomly chosen rows."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether the prompts of a named task go through the tokenizer's chat template; auto: if it has one."""
    chat_template: str | None = None
    """Chat template for models without one: chatml, llama3, mistral, gemma, or a Jinja file. It is saved with
    the tokenizer of tuned models. null: the tokenizer's own."""
    validation: str | None = None
    """Rows that decide how many layers go (plan.max_loss) and which row the report recommends. null: if
    plan.max_loss or recover needs such rows, they are held out of the training rows."""
    validation_limit: int = Field(default=500, ge=1)
    """Most validation rows. If they are held out, also at most a fifth of the training rows; at most a tenth
    and 200 if they only decide about a recovery."""
    max_length: int = Field(default=2048, ge=2)
    """Most tokens of a sample; longer prompts are cut from the left."""
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
            raise ValueError(
                f"data.{own[0]} is for rows of your own; the rows of data.task have their own columns"
            )
        if self.format != "auto" and (self.prompt or self.completion):
            raise ValueError("data.format and data.prompt / data.completion exclude each other")
        return self


class ScoreSection(Section):
    """How recorded gradients become a score."""

    norm: Literal["squared", "frobenius"] = "squared"
    """squared: mean squared simulated gradient (paper). frobenius: sum of norms (released code)."""


class PlanSection(PlanOptions):
    """How many layers are pruned, which are protected, and how merged layers are combined."""

    file: str | None = None
    """Use this plan file (from `gradpruner plan`, perhaps edited) for merged, dropped, gradpruner and either.
    It says which layers go, so no budget is given beside it."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]{0,59}$")
    """Name of this plan, whose results go to variants/<row>@<name>. null: the first plan in a run directory
    has no name, and further plans are named after the settings that differ. Applies to one start only."""
    max_loss: float | None = Field(default=None, gt=0, lt=1)
    """Prune as many layers as possible while losing at most this share of the dense model's score (0.01 is
    1 %), certified on validation rows before any recovery. Needs start: tuned or given."""
    confidence: float = Field(default=0.9, gt=0.5, lt=1)
    """Confidence with which the loss is within max_loss."""
    unit: Literal["parameters", "decoder_parameters"] = "parameters"
    """Budget of methods that do not prune whole layers: they remove as many parameters as the pruned layers
    would hold, counted in the whole model or without embeddings and head (decoder_parameters)."""
    portable_to: list[Literal["vllm", "sglang", "llama.cpp"]] = Field(default_factory=list)
    """Engines that must serve the pruned model correctly. Some derive the kind of a layer from its position
    (in Gemma 2 and 3, gpt-oss, Cohere 2, Llama 4, SmolLM3 ...); this restricts which layers may go."""
    rule: Literal["sum", "mean", "fisher", "weighted_average", "norm_preserving"] = "sum"
    """Combine rule (`gradpruner ls rules`)."""
    repair: Literal["auto", RepairKind] = "none"
    """Refit the last linear before each removed block on training samples, so that the layers behind it get
    nearly the inputs they got before. linear: fit a map of the hidden size. least_squares: fit the linear
    itself. layer_wise: fit it in every kept layer after the first removed block too. auto: layer_wise for a
    tuned model, least_squares with start: base, none if the model cannot be repaired (mixture of experts,
    quantised)."""
    repair_rows: int | None = Field(default=None, ge=2)
    """Most training samples a repair is fitted on; null: as many as determine it well, at least 512;
    with start: base fewer, since the model is trained on all rows afterwards."""
    repair_answers: float | None = Field(default=None, ge=0, lt=1)
    """Share of a repair's weight that tokens get by how much the answer depends on them; 0: all count the
    same. null: 0.8 if a tuned model is pruned, 0 with start: base."""

    @model_validator(mode="after")
    def _file_or_budget(self) -> PlanSection:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if self.file is not None and given:
            raise ValueError(
                f"file says which layers go, and {given[0]} how many; give one of them, the other as null"
            )
        return self


class RecoverSection(Section):
    """Training after a tuned model was pruned (start: tuned or given)."""

    epochs: float = Field(default=0.0, ge=0)
    """Passes over the training data; 0: no training."""
    steps: int | None = Field(default=None, ge=0)
    """Optimizer steps, instead of epochs; 0: no training."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null: half of finetune.learning_rate, or of its default; with start: given,
    finetune.learning_rate itself if the recipe sets it."""
    keep_better: bool = True
    """Keep the pruned model if training clearly raises its loss on validation rows (the 95 % interval of the
    paired change is above 0); otherwise the trained one. The rows are data.validation, or held out of the
    training rows. false: always the trained one."""

    @property
    def trains(self) -> bool:
        """Whether the pruned model is trained."""
        return self.epochs > 0 if self.steps is None else self.steps > 0


class AlsoSection(Section):
    """A further task that every variant is evaluated on but not trained on."""

    task: str
    """A named task (`gradpruner ls tasks`)."""
    folder: str | None = None
    """Local folder with the splits of the task; null reads the hub dataset."""
    limit: int | None = Field(default=None, ge=1)
    """Evaluate on this many randomly chosen rows."""


class EvaluateSection(AskingSection):
    """How variants are evaluated."""

    also: list[AlsoSection] = Field(default_factory=list)
    """Further tasks to evaluate the fine-tuned variants on: transfer, or a reasoning probe (gsm8k)."""
    lm_eval: list[str] = Field(default_factory=list)
    """Tasks of lm-evaluation-harness to evaluate the fine-tuned variants on."""
    lm_eval_folder: str | None = None
    """Folder with your own lm-eval task files."""
    lm_eval_limit: int | None = Field(default=None, ge=1)
    """Most examples of each lm-eval task; null takes all."""
    before_finetuning: bool = True
    """Also evaluate each variant before fine-tuning."""
