"""Runs llama.cpp in another interpreter and compares its results with those of transformers."""

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
SPM_VOCAB = 512  # entries of the small tokenizers
NEW_TOKENS = 32
AGREES = 1e-2
"""Largest relative error at which two results count as the same. Both sides are float32, but llama.cpp takes
GELU from a half-precision table, which alone causes errors up to 3e-3 in these models, and divides gemma3n's
standard deviations by another number (7e-3 with both). Other correct models have errors of 1e-6 or 1e-5,
wrong ones of 2e-1 or more."""


class Engine:
    """The process of the other interpreter, kept running for all jobs."""

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
            sys.exit("The interpreter given by --python does not start; see the docstring for what it needs.")
        return json.loads(line)

    def do(self, what: str, **job: Any) -> str:
        """Runs a job; returns "" or what went wrong."""
        log = self.folder / "log.txt"
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "log": str(log), **job}) + "\n")
        self.process.stdin.flush()
        status = self._answer()["status"]
        return self._fault(log.read_text(encoding="utf-8", errors="replace"), status) if status else ""

    def _fault(self, log: str, status: int) -> str:
        """Returns the most informative line of a log, without paths of this machine."""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"error load|not supported|GGML_ASSERT", line)]
        line = re.sub(r"\x1b\[[\d;]*m", "", (telling or lines[-1:] or [f"exit status {status}"])[0])
        line = re.sub(r"^[\d.]+ E |^ERROR:hf-to-gguf:|llama_model_load: |check_tensor_dims: ", "", line)
        return re.sub(r"/[\w/.-]*/([\w.-]+)", r"\1", line)[:200]

    def close(self) -> None:
        """Ends the process."""
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
    """Converts a checkpoint, runs it in llama.cpp, and compares the results with transformers.

    Args:
        engine: The running engine.
        model: Folder of the checkpoint.
        prompts: Texts to continue greedily, or token ids.
        outtype: Type of the tensors in the GGUF file.
        pre: Pre-tokenizer the converter is told to use; "" lets it find out.
        exact: Whether the KV cache is in float32; otherwise llama.cpp's defaults apply.
        options: Further options of the converter.
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
    """Returns log-probabilities at the last `count` tokens, from one forward pass over all tokens."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -count - 1 : -1]
    return logits.double().log_softmax(-1).numpy()


def engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all benchmarks of llama.cpp have."""
    parser.add_argument("--converter", type=Path, help="source tree of llama.cpp")
    parser.add_argument("--python", type=Path, help="interpreter with xllamacpp")
    parser.add_argument("--converter-name", default="", help="version of llama.cpp, for the record")
    parser.add_argument("--json", type=Path, help="file to write")


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[Engine]:
    """Starts the engine with a temporary folder that holds its tokenizers, and ends it after the block."""
    with tempfile.TemporaryDirectory() as name:
        engine = Engine(args.python, args.converter, Path(name))
        fault = engine.do("tokenizers", folder=name, text=str(ROOT / "LICENSE"), vocab=SPM_VOCAB)
        if fault:
            sys.exit(fault)
        yield engine
        engine.close()


def versions_of(engine: Engine, converter_name: str) -> dict[str, str]:
    """Returns the versions of the programs that ran."""
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
    """Returns an earlier result with the rows of new families replaced; new rows note their commit."""
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
