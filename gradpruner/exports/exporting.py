"""export_model: a finished model as a GGUF file, compared with the model, and a Modelfile for Ollama."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, ModelError
from gradpruner.common.files import make_durable, staging, write_text
from gradpruner.exports.comparing import Comparison, compare
from gradpruner.exports.gguf import file_type, find_tools, write_gguf
from gradpruner.exports.ollama import MODELFILE, modelfile
from gradpruner.exports.shipped import FinishedModel, whole_model


def export_model(
    model: FinishedModel,
    file: Path | None = None,
    *,
    quantize: str | None = None,
    ollama: bool = False,
    llama_cpp: Path | None = None,
) -> dict[str, Any]:
    """Writes a model as one GGUF file and compares the two; only then do the files get their final names.

    Args:
        model: See `shipped.open_model`.
        file: The GGUF file; None: in RUN/exports, or beside the model folder.
        quantize: Type to quantise to, "Q4_K_M" for example; None keeps 16 bits.
        ollama: Also write a Modelfile beside it.
        llama_cpp: Source folder of llama.cpp; None takes $LLAMA_CPP_DIR or the installed converter.

    Returns:
        JSON values: the files, what was compared, and what to tell the user.

    Raises:
        ConfigError: If a file is there already, or llama.cpp's tools are missing.
        ModelError: If llama.cpp does not serve this model, or the file gives other answers.
    """
    kind = file_type(quantize, model.base if model.is_adapter else model.folder)
    tools = find_tools(kind, llama_cpp)
    _refuse_unfit(model)
    target = (
        file
        or (model.run / "exports" if model.run else model.folder.resolve().parent)
        / f"{model.name}-{kind}.gguf"
    )
    beside = target.with_name(MODELFILE)
    for path in (target, *([beside] if ollama else [])):
        if path.exists():
            raise ConfigError(
                f"{path} already exists.", hint="Nothing is overwritten: give another FILE, or move this one."
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_model(model, target) as folder, staging(target) as staged:
        write_gguf(folder, staged, kind, tools)
        outcome: Comparison = compare(folder, staged, kind, model.asked())
        if outcome.is_wrong:
            raise ModelError(
                f"The GGUF file gives other answers than the model, and was removed. {outcome.sentence()}",
                hint="Update llama.cpp; docs/serving.md lists the model types it runs correctly.",
            )
        facts: dict[str, Any] = {
            "model": str(model.folder),
            "row": model.row,
            "gguf": str(target),
            "type": kind,
        }
        facts |= {"bytes": staged.stat().st_size, "compared": outcome.facts(), "said": outcome.sentence()}
        if ollama:
            made = modelfile(folder, target, model.asked())
            write_text(beside, made.text)
            name = re.sub(r"[^a-z0-9._-]+", "-", model.name.lower()).strip("-._") or "pruned"
            facts |= {"modelfile": str(beside), "note": made.note, "ollama_name": name}
        make_durable(staged)
        os.replace(staged, target)
    return facts


def _refuse_unfit(model: FinishedModel) -> None:
    """Raises ModelError if llama.cpp is known not to serve this model correctly."""
    for entry in model.facts.get("portability") or ():
        if entry.get("engine") == "llama.cpp" and entry.get("status") in ("refused", "wrong"):
            raise ModelError(
                f"llama.cpp does not serve this model correctly ({entry['status']}): {entry['reason']}",
                hint="`gradpruner plan --portable-to llama.cpp` chooses layers such that it does.",
            )
