"""Chat templates by name, for tokenizers that have none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError
from gradpruner.common.files import read_plain
from gradpruner.common.provenance import sha256_json
from gradpruner.common.registry import suggest

_SYSTEM_IN_USER = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)

TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": _SYSTEM_IN_USER
    + (
        "{% for m in turns %}{% if m['role'] == 'user' %}"
        "[INST] {{ (system if loop.first else '') + m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": _SYSTEM_IN_USER
    + (
        "{% for m in turns %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ (system if loop.first else '') + m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
"""Templates as the models of these names use them; Mistral and Gemma put a system turn into the first user
turn."""

MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "</s>",
)
"""Markers that models write between turns and at the end of a text."""


def choose_template(tokenizer: Any, chosen: str | None) -> Any:
    """Gives the tokenizer a chat template: one of `TEMPLATES` or a Jinja file; None keeps its own.

    Raises:
        ConfigError: If there is neither a template of that name nor such a file.
        IntegrityError: If the file cannot be read as text.
    """
    if chosen is not None:
        tokenizer.chat_template = template_text(chosen)
    return tokenizer


def template_text(chosen: str) -> str:
    """Returns the template of a name or a path; raises as `choose_template`."""
    if chosen in TEMPLATES:
        return TEMPLATES[chosen]
    path = Path(chosen)
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template is '{chosen}', which is neither a known name nor a file."
            f"{suggest(chosen, TEMPLATES)}",
            hint=f"Give one of {', '.join(TEMPLATES)}, or the path of a Jinja file.",
        )
    try:
        return read_plain(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: {error}.", hint="Save the template as UTF-8."
        ) from error


def template_mark(chosen: str | None) -> str:
    """Returns a mark of a template, by its hash, for the format of a set; "" for the tokenizer's own."""
    return "" if chosen is None else f", chat template {sha256_json(template_text(chosen))[:12]}"


def foreign_markers(tokenizer: Any, texts: Mapping[str, str]) -> str:
    """Returns a warning of other models' markers in the texts of rows, by row id; "" if there are none.

    A marker that is a single token of this tokenizer is not foreign.
    """
    known = tokenizer.get_vocab()
    foreign = [marker for marker in MARKERS if marker not in known]
    hits = {marker: [row for row, text in texts.items() if marker in text] for marker in foreign}
    named = ", ".join(
        f"{marker} ({len(rows)} rows, first {rows[0]})" for marker, rows in hits.items() if rows
    )
    return (
        f"rows contain markers of another model's template as plain text: {named}; they would be learned "
        "letter by letter: remove them, or give the rows as conversations and set data.chat_template"
        if named
        else ""
    )
