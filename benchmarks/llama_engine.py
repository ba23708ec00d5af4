"""llama.cpp in the other interpreter, and how far what it computes is from transformers."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent
SEED = 0
NEW_TOKENS = 32
AGREES = 1e-2
"""Largest relative error that counts as computing the same. Both sides are float32, but llama.cpp looks GELU
up in a table of half precision, which alone makes up to 3e-3 in these models, and has another denominator in
gemma3n's standard deviations (7e-3 with it); the others come to 1e-6 or 1e-5. What is wrong is off by 2e-1 or
more."""


class Engine:
    """The other interpreter, kept running."""

    def __init__(self, python: Path, converter: Path, folder: Path) -> None:
        command = [str(python.absolute()), str(HERE / "llama_worker.py"), str(converter.resolve())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.folder = folder
        self.versions: dict[str, str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("The other Python does not start; it needs what the docstring says.")
        return json.loads(line)

    def do(self, what: str, **job: Any) -> str:
        """Carries a job out. Returns "" or what went wrong."""
        log = self.folder / "log.txt"
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "log": str(log), **job}) + "\n")
        self.process.stdin.flush()
        status = self._answer()["status"]
        return self._fault(log.read_text(encoding="utf-8", errors="replace"), status) if status else ""

    def _fault(self, log: str, status: int) -> str:
        """The line of a log that says most, without folders of this machine."""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"error load|not supported|GGML_ASSERT", line)]
        line = re.sub(r"\x1b\[[\d;]*m", "", (telling or lines[-1:] or [f"exit status {status}"])[0])
        line = re.sub(r"^[\d.]+ E |^ERROR:hf-to-gguf:|llama_model_load: |check_tensor_dims: ", "", line)
        return re.sub(r"/[\w/.-]*/([\w.-]+)", r"\1", line)[:200]

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(
    engine: Engine,
    model: Path,
    prompts: list[Any],
    outtype: str = "f32",
    pre: str = "",
    exact: bool = True,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Converts a checkpoint, runs it, and says how far llama.cpp is from transformers.

    Args:
        engine: The other interpreter.
        model: A checkpoint.
        prompts: Texts, to be continued greedily, or token ids.
        outtype: Type of the file's tensors.
        pre: Pre-tokenizer to claim.
        exact: With the cache in float32; otherwise llama.cpp's defaults.
        options: Further ones for the converter.
    """
    import numpy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, arrays, answer_file = (engine.folder / name for name in ("model.gguf", "out.npz", "answer.json"))
    for old in (file, arrays, answer_file):
        old.unlink(missing_ok=True)
    how = {"outtype": outtype, "pre": pre, "options": list(options)}
    fault = engine.do("convert", model=str(model), gguf=str(file), **how)
    if fault:
        return {"outcome": "not converted", "error": fault}
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    job = {"vocab": reference.config.get_text_config().vocab_size, "new": NEW_TOKENS, "exact": exact}
    fault = engine.do(
        "generate", gguf=str(file), prompts=prompts, arrays=str(arrays), answer=str(answer_file), **job
    )
    if fault:
        return {"outcome": "not loaded", "error": fault}
    answer = json.loads(answer_file.read_text(encoding="utf-8"))
    difference, size, same, total = 0.0, 0.0, 0, 0
    for number, (prompt, tokens) in enumerate(zip(answer["prompts"], answer["tokens"], strict=True)):
        expected = log_probabilities(reference, [*prompt, *tokens], len(tokens))
        found = numpy.load(arrays)[f"prompt{number}"].astype(numpy.float64)
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        total += len(tokens)
        expected, found = (x - x.mean(-1, keepdims=True) for x in (expected, found))
        difference += float(((found - expected) ** 2).sum())
        size += float((expected**2).sum())
    error = (difference / size) ** 0.5
    result = {
        "outcome": "same" if error <= AGREES else "differs",
        "relative_error": float(f"{error:.2e}"),
        "likeliest_tokens_equal": [same, total],
        "gguf_bytes": file.stat().st_size,
    }
    if isinstance(prompts[0], str):
        tokenizer = AutoTokenizer.from_pretrained(model)
        result["prompts_tokenized_alike"] = [tokenizer(x).input_ids for x in prompts] == answer["prompts"]
    return result


def log_probabilities(model: Any, ids: list[int], count: int) -> Any:
    """Of the last `count` tokens, by one forward pass over all."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -count - 1 : -1]
    return logits.double().log_softmax(-1).numpy()


def engine_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of llama.cpp asks for."""
    parser.add_argument("--converter", type=Path, help="source tree of llama.cpp")
    parser.add_argument("--python", type=Path, help="interpreter with xllamacpp")
    parser.add_argument("--converter-name", default="", help="which llama.cpp it is, to be recorded")
    parser.add_argument("--json", type=Path, help="file to write")


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[Engine]:
    """The other interpreter, with a folder of its own and tokenizers in it."""
    with tempfile.TemporaryDirectory() as name:
        engine = Engine(args.python, args.converter, Path(name))
        fault = engine.do("tokenizers", folder=name, text=str(ROOT / "LICENSE"))
        if fault:
            sys.exit(fault)
        yield engine
        engine.close()


def versions_of(engine: Engine, converter_name: str) -> dict[str, str]:
    """What was run."""
    from gradpruner.models.engines import VERSIONS

    return {
        "converter": converter_name,
        "engine": f"xllamacpp {engine.versions['xllamacpp']}",
        "converter_transformers": engine.versions["transformers"],
        "rules_read_in": VERSIONS["llama.cpp"],
    }


def show_family(row: dict[str, Any]) -> None:
    measured = f"{row['relative_error']:.1e}" if "relative_error" in row else row["error"]
    mark = "" if row["as_said"] else "  <-- NOT AS SAID"
    print(
        f"{row['model_type']:17} {row['layers']:3} layers  {row['plan']:11} {row['verdict']:8} "
        f"{row['outcome']:13} {measured}{mark}",
        flush=True,
    )


def updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """An earlier result with the families that were run again; their commit is noted in their rows."""
    again = {row["model_type"]: row for row in new["families"]}
    for row in new["families"]:
        row["commit"] = new["provenance"]["commit"]
    rows, placed = [], set()
    for row in old["families"]:
        if row["model_type"] not in again:
            rows.append(row)
        elif row["model_type"] not in placed:
            placed.add(row["model_type"])
            rows += [r for r in new["families"] if r["model_type"] == row["model_type"]]
    return old | {key: new[key] for key in ("trained",) if key in new} | {"families": rows}


def verdict_of(config: Any, keep: tuple[int, ...]) -> Any:
    from gradpruner.models.engines import layer_facts, portability_of_layers

    return next(v for v in portability_of_layers(layer_facts(config), keep) if v.engine == "llama.cpp")


def expected_outcomes(status: str) -> tuple[str, ...]:
    return {
        "ok": ("same",),
        "wrong": ("differs",),
        "refused": ("not converted", "not loaded"),
        "unknown": ("not converted", "not loaded"),
    }[status]
