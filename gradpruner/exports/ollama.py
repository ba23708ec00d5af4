"""Writes the Modelfile with which Ollama runs a GGUF file: template, stops, parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.json_files import read_json
from gradpruner.exports.turns import Turns, find_turns
from gradpruner.models.config_patch import text_config
from gradpruner.models.loading import load_config, load_tokenizer

MODELFILE = "Modelfile"
PLAIN = "{{ .Prompt }}"
MOST_CONTEXT = 8192


@dataclass(frozen=True)
class Modelfile:
    """The text of a Modelfile, and a note for the user about its template."""

    text: str
    note: str


def modelfile(folder: Path, gguf: Path, asked: Sequence[str] = ()) -> Modelfile:
    """Returns the Modelfile of a model, to be written beside its GGUF file.

    `asked` are ends of the prompts the model was measured with. They show whether it was measured through its
    chat template.
    """
    tokenizer = load_tokenizer(folder)
    template, turns, note = _template(tokenizer, asked)
    config = text_config(load_config(folder))
    longest = getattr(config, "max_position_embeddings", None)
    lines = [f"# {note}", f"FROM ./{gguf.name}", f'TEMPLATE """{template}"""']
    lines += [
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in _stops(folder, tokenizer, turns)
    ]
    if isinstance(longest, int):
        lines.append(f"PARAMETER num_ctx {min(longest, MOST_CONTEXT)}")
    # As it was measured: greedy, without a penalty on repetition.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return Modelfile("\n".join([*lines, ""]), note)


def _template(tokenizer: Any, asked: Sequence[str]) -> tuple[str, Turns | None, str]:
    """Returns the template in Ollama's language, its turns, and a note that says where it comes from."""
    if not tokenizer.chat_template:
        return PLAIN, None, "The model has no chat template: the prompt is passed on as it is."
    turns = find_turns(tokenizer)
    if isinstance(turns, str):
        note = (
            f"The chat template could not be translated: {turns}. The prompt is passed on as it is; before "
            "you chat with the model, write a TEMPLATE that does what chat_template.jinja does."
        )
        return PLAIN, None, note
    ending = f"{turns.user[1]}{turns.reply}".rstrip()
    if asked and not any(prompt.rstrip().endswith(ending) for prompt in asked):
        note = "The model was tuned and measured on plain prompts: the prompt is passed on as it is."
        return PLAIN, None, note
    start = tokenizer.encode("a")[:1]  # some tokenizers add the start token themselves
    template = turns.go_template(start_is_added=bool(start) and start[0] == tokenizer.bos_token_id)
    if '"""' in template:
        note = (
            'The chat template contains """, which a Modelfile cannot hold: the prompt is passed on as it is.'
        )
        return PLAIN, None, note
    dated = "strftime_now" in str(tokenizer.chat_template)
    note = "The tokenizer's chat template, turn by turn" + (", with today's date in it." if dated else ".")
    if turns.system is None and turns.joint is None:
        note += " It has no system messages."
    return template, turns, note


def _stops(folder: Path, tokenizer: Any, turns: Turns | None) -> list[str]:
    """Returns the tokens that end an answer, as text."""
    ends: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name, name).get("eos_token_id") if (folder / name).is_file() else None
        ends += found if isinstance(found, list) else [found]
    known = [
        tokenizer.convert_ids_to_tokens(end)
        for end in [*ends, tokenizer.eos_token_id]
        if isinstance(end, int)
    ]
    closing = turns.assistant[1].strip() if turns is not None else ""
    if closing in tokenizer.get_vocab():
        known.append(closing)
    return [stop for stop in dict.fromkeys(known) if stop]
