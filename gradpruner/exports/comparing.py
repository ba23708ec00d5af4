"""Checks that a GGUF file answers like the model it was made from, by greedy tokens for a few prompts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from gradpruner.common.errors import ModelError
from gradpruner.evaluation.generation import only_generation_config
from gradpruner.exports.gguf import PLAIN_TYPES
from gradpruner.models.loading import load_model, load_tokenizer

TEXTS = (
    "The city of Paris is",
    "In 1969 the first men to land on the Moon",
    "Question: 1,234 + 5 =\nAnswer:",
)
NEW_TOKENS = 24
MOST_PROMPTS = 4
_INSTALL = "Install llama.cpp with: pip install 'gradpruner[gguf]'"


@dataclass(frozen=True)
class Comparison:
    """How the answers of the GGUF file compare with those of transformers.

    Attributes:
        engine: What ran the file; empty if nothing could.
        prompts: Number of prompts.
        same_prompts: Number of prompts that both answered with the same tokens.
        tokens: Number of tokens that transformers answered.
        same_tokens: Number of these tokens before the first difference in each answer.
        same_tokenizer: Whether the file splits texts into the same tokens; None if that was not tried.
        why_not: Why nothing was compared.
    """

    engine: str = ""
    prompts: int = 0
    same_prompts: int = 0
    tokens: int = 0
    same_tokens: int = 0
    same_tokenizer: bool | None = None
    why_not: str = ""

    def facts(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """Returns the outcome in words."""
        if not self.engine:
            return f"Not compared with transformers: {self.why_not}"
        said = (
            f"Compared with transformers ({self.engine}): {self.same_prompts} of {self.prompts} prompts are "
            f"answered with the same tokens, {self.same_tokens} of {self.tokens} tokens are the same up to "
            "the first difference."
        )
        if self.same_tokenizer is False:
            said += " The file splits texts into other tokens than the tokenizer: its answers will differ."
        return said

    @property
    def is_wrong(self) -> bool:
        """Whether the file gives other answers: the first token of every answer is wrong."""
        return bool(self.engine) and self.tokens > 0 and self.same_tokens == 0


def has_llama_cpp() -> bool:
    """Whether llama.cpp can run in this Python environment."""
    return importlib.util.find_spec("xllamacpp") is not None


def compare(folder: Path, gguf: Path, kind: str, asked: Sequence[str] = ()) -> Comparison:
    """Gives the model and the file the same prompts and compares their greedy answers.

    `asked` are prompts that the model was measured with, special tokens included. If there are none, `TEXTS`
    are used.

    Raises:
        ModelError: If llama.cpp is installed but cannot run the file.
    """
    from transformers import AutoModelForCausalLM

    if not has_llama_cpp() and kind not in PLAIN_TYPES:
        return Comparison(why_not=f"llama.cpp cannot be run here. {_INSTALL}")
    tokenizer = load_tokenizer(folder)
    padding = tokenizer.pad_token_id or 0
    texts = list(dict.fromkeys(asked))[:MOST_PROMPTS]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    prompts = prompts or [tokenizer.encode(text) for text in TEXTS]
    same_tokenizer = None
    if has_llama_cpp():
        reply = _llama_cpp(gguf, prompts)
        engine, answers = f"llama.cpp in xllamacpp {reply['version']}", reply["tokens"]
        same_tokenizer = reply["tokenised"] == [tokenizer.encode(text) for text in TEXTS]
    else:
        try:
            gguf_model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name).eval()
            answers = _greedy(gguf_model, prompts, padding)
        except Exception as error:  # which GGUF files transformers reads changes with every release
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            return Comparison(
                why_not=f"no llama.cpp here, and transformers does not read the file ({reason}). {_INSTALL}"
            )
        engine = "the GGUF file read by transformers; llama.cpp was not run"
    model: Any = load_model(folder)
    named = model.generation_config.eos_token_id  # some engines return the end token, others do not
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    expected = [_up_to(ids, ends) for ids in _greedy(model, prompts, padding)]
    return _judged(engine, expected, [_up_to(ids, ends) for ids in answers], same_tokenizer)


def _judged(
    engine: str, expected: list[list[int]], found: list[list[int]], same_tokenizer: bool | None
) -> Comparison:
    same = 0
    for wanted, answer in zip(expected, found, strict=True):
        for one, other in zip(wanted, answer, strict=False):
            if one != other:
                break
            same += 1
    whole = sum(wanted == answer for wanted, answer in zip(expected, found, strict=True))
    return Comparison(engine, len(expected), whole, sum(map(len, expected)), same, same_tokenizer)


def _up_to(ids: list[int], ends: set[int]) -> list[int]:
    """Cuts an answer at its end token, which becomes -1, so that stopping is compared too."""
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if stop is None else [*ids[:stop], -1]


def _greedy(model: Any, prompts: list[list[int]], padding: int) -> list[list[int]]:
    """Returns the tokens that transformers answers to each prompt, without a penalty for repetition."""
    answers = []
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=model.generation_config.eos_token_id,
    )
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode(), only_generation_config((model,), config):
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


def _llama_cpp(gguf: Path, prompts: list[list[int]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        job = {"gguf": str(gguf), "prompts": prompts, "texts": TEXTS, "new": NEW_TOKENS}
        job["threads"] = torch.get_num_threads()
        done = subprocess.run(
            [sys.executable, "-m", "gradpruner.exports.engine"],
            input=json.dumps(job | {"answer": str(answer)}),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0 and answer.is_file():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = (
        [line for line in said if "rror" in line or "GGML_ASSERT" in line] or said or ["no reason given"]
    )
    raise ModelError(
        f"llama.cpp does not run the file: {telling[-1][:300]}",
        hint="docs/serving.md says which model types llama.cpp was tried with. A newer llama.cpp may run it: "
        "pip install -U xllamacpp",
    )
