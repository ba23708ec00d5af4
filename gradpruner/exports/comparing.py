"""Whether a GGUF file answers as the model it was made from: greedy tokens, prompt by prompt."""

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

from gradpruner.common.errors import ModelError
from gradpruner.exports.gguf import PLAIN_TYPES
from gradpruner.models.loading import load_model, load_tokenizer

TEXTS = (
    "The city of Paris is",
    "In 1969 the first men to land on the Moon",
    "Question: 1,234 + 5 =\nAnswer:",
)
NEW_TOKENS = 24
MOST_PROMPTS = 4


@dataclass(frozen=True)
class Comparison:
    """How the answers of both compare.

    Attributes:
        engine: Who ran the file; empty where nobody could.
        prompts: How many were asked.
        same_prompts: Of them, those answered with the very same tokens.
        tokens: Tokens that transformers answered.
        same_tokens: Of them, those up to the first difference in each answer.
        same_tokenizer: Whether the file cuts texts into the same tokens; None if that was not asked.
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
        """JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """The outcome in words."""
        if not self.engine:
            return f"Not compared with transformers: {self.why_not}"
        said = (
            f"Compared with transformers ({self.engine}): {self.same_prompts} of {self.prompts} prompts are "
            f"answered with the same tokens, {self.same_tokens} of {self.tokens} tokens are the same up to "
            "the first difference."
        )
        if self.same_tokenizer is False:
            said += " The file cuts texts into other tokens than the tokenizer: its answers will differ."
        return said

    @property
    def is_wrong(self) -> bool:
        """Whether the file computes something else: not one first token is right."""
        return bool(self.engine) and self.tokens > 0 and self.same_tokens == 0


def has_llama_cpp() -> bool:
    """Whether llama.cpp can be run here."""
    return importlib.util.find_spec("xllamacpp") is not None


def compare(folder: Path, gguf: Path, kind: str, asked: Sequence[str] = ()) -> Comparison:
    """Asks the model and the file the same prompts, greedily, and compares their answers.

    Asked are the prompts the model was measured with, special tokens included, or some texts where there are
    none.

    Raises:
        ModelError: If the file cannot be run, though there is an engine for it.
    """
    from transformers import AutoModelForCausalLM

    if not has_llama_cpp() and kind not in PLAIN_TYPES:
        return Comparison(why_not="llama.cpp cannot be run here; pip install 'gradpruner[gguf]' brings it.")
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in dict.fromkeys(asked)][
        :MOST_PROMPTS
    ]
    prompts = prompts or [tokenizer.encode(text) for text in TEXTS]
    if has_llama_cpp():
        found = _llama_cpp(gguf, prompts)
        engine, right = f"llama.cpp in xllamacpp {found['version']}", found["tokens"]
        alike: bool | None = found["tokenised"] == [tokenizer.encode(text) for text in TEXTS]
    else:
        try:
            read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name).eval()
            right = _greedy(read, prompts, tokenizer.pad_token_id or 0)
        except Exception as error:  # what transformers reads of GGUF changes with every release
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            return Comparison(
                why_not=f"no llama.cpp here, and transformers does not read the file ({reason})."
            )
        engine, alike = "reading the GGUF itself; llama.cpp was not run", None
    model: Any = load_model(folder)
    named = model.generation_config.eos_token_id  # engines differ in whether they hand out the end
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    expected = _greedy(model, prompts, tokenizer.pad_token_id or 0)
    return _judged(
        engine, [_up_to(ids, ends) for ids in expected], [_up_to(ids, ends) for ids in right], alike
    )


def _judged(engine: str, expected: list[list[int]], found: list[list[int]], alike: bool | None) -> Comparison:
    same = 0
    for wanted, answer in zip(expected, found, strict=True):
        for one, other in zip(wanted, answer, strict=False):
            if one != other:
                break
            same += 1
    whole = sum(wanted == answer for wanted, answer in zip(expected, found, strict=True))
    return Comparison(engine, len(expected), whole, sum(map(len, expected)), same, alike)


def _up_to(ids: list[int], ends: set[int]) -> list[int]:
    """An answer up to its end, which becomes one mark, so that stopping is compared too."""
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if stop is None else [*ids[:stop], -1]


def _greedy(model: Any, prompts: list[list[int]], padding: int) -> list[list[int]]:
    """The tokens transformers answers."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=padding,
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
    raise ModelError(f"llama.cpp does not run the file: {telling[-1][:300]}", hint="See docs/serving.md.")
