"""Advice that can be followed: options, commands and recipe keys in messages, help and documents exist."""

import ast
import re
from pathlib import Path

import pytest
import typer

import gradpruner
from gradpruner.cli.main import app
from gradpruner.methods import METHODS
from gradpruner.runs.recipe.key_hints import ALIASES, SECTION_ALIASES, meant_key
from gradpruner.runs.recipe.recipe import Recipe, key_names

PACKAGE = Path(gradpruner.__file__).parent
DOCUMENTS = [PACKAGE.parent / "README.md", *sorted((PACKAGE.parent / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
OPTIONS = {
    name
    for command in COMMANDS.values()
    for option in command.params
    for name in (*option.opts, *option.secondary_opts)
}
# Options of other programs, where a message names the program.
FOREIGN = {"--local-dir": "hf download", "--port": "vllm", "--nproc-per-node": "torchrun"}
FOREIGN |= {"--dataset": "trl sft", "--output": "trl sft", "--bf": "--bf16 false", "--use": "--use_cpu true"}
FOREIGN |= {"--standalone": "torchrun", "--master-port": "torchrun", "--generation-config": "vllm serve"}
KEYS = set(key_names(Recipe))
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
# "finetune.learning_rate", but neither plan.json nor the recorder's record.step() in code.
KEY = re.compile(rf"(?<![\w./])({'|'.join(sorted(SECTIONS | {'methods'}))})\.([a-z_]+)\b(?![(./])")
SUFFIXES = ("json", "yaml", "py", "safetensors", "jsonl", "md", "html")


def messages(path: Path) -> list[str]:
    """What a module may say to somebody: its texts of several words, docstrings and CSS left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    parts: set[int] = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = [piece for piece in node.values if isinstance(piece, ast.Constant)]
            parts |= {id(piece) for piece in texts}
            found.append("…".join(str(piece.value) for piece in texts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | parts:
            found.append(node.value)
    return [text for text in found if " " in text and "</" not in text and "var(" not in text]


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def keys_in(text: str) -> set[str]:
    return {match[0] for match in KEY.finditer(text) if match[2] not in SUFFIXES}


def is_key(key: str) -> bool:
    section, _, name = key.partition(".")
    return name in METHODS.names() if section == "methods" else key in KEYS


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_messages_name_only_options_and_keys_that_exist(path: Path) -> None:
    for text in messages(path):
        unknown = {o for o in options_in(text) if o not in OPTIONS and FOREIGN.get(o, "\0") not in text}
        assert not unknown, f"{path.name}: {text!r}"
        assert all(map(is_key, keys_in(text))), f"{path.name}: {text!r}"
        for name in re.findall(r"`gradpruner ([a-z]+)", text):
            assert name in COMMANDS, f"{path.name}: {text!r}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_keys_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"--set ['\"]?([\w.]+)=", text):
        assert line in KEYS | {"section.key", "key"} or is_key(line.rpartition(".")[0]), line
    for line in re.findall(r"^gradpruner .*$", text, re.MULTILINE):
        assert options_in(line) <= OPTIONS, line


def test_the_walk_finds_messages() -> None:
    texts = "\n".join(text for path in PACKAGE.rglob("*.py") for text in messages(path))
    assert {"--skip-bad", "--out", "--set"} <= options_in(texts)
    assert {"data.max_length", "plan.repair", "recover.epochs"} <= keys_in(texts)


def test_every_suggestion_exists() -> None:
    assert set(ALIASES.values()) <= KEYS and set(SECTION_ALIASES.values()) <= SECTIONS
    for name in ALIASES:
        assert meant_key(name, sorted(KEYS)) in KEYS
    assert meant_key("xyzzy", sorted(KEYS)) is None
