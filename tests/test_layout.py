"""The structure docs/design.md promises, kept by tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradpruner

PACKAGE = Path(gradpruner.__file__).parent
# Dependency order is reading order: a module may import only what stands before it.
READING_ORDER = """
    _version errors registry files metrics certification
    importance merging gates ridge trace trace_writer scores plan selection repair width_plan
    progress provenance cost
    shards packing family depth layered portability portability_widths surgery walking refitting width narrowing
    formats data encoding tasks
    adapters callbacks resume batching trainer teacher training distillation step_gradients recording
    likelihood questions generation outputs folder similarity evaluation endpoint harness
    checkpoint blueprint verify streaming delta_record delta width_checkpoint
    costing methods
    config evaluation_data rundir job depth_search variant run_record report pipeline preview study doctor demo
    cli_options cli cli_shrink cli_evaluate cli_models cli_cost cli_compare
"""
ORDER = READING_ORDER.split()
# Named here with the reason; each is an import inside a function.
ALLOWED = {("data", "tasks"): "a hint that rows look like those of a named task"}
PURE = (
    "importance",
    "merging",
    "gates",
    "trace",
    "trace_writer",
    "scores",
    "plan",
    "selection",
    "repair",
    "width_plan",
    "portability",
    "portability_widths",
    "metrics",
    "certification",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def home(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_modules_import_only_what_stands_before_them() -> None:
    wrong = []
    for path in modules():
        here = home(path)
        if here in ("__init__", "__main__"):
            continue
        assert here in ORDER, f"{here} has no place in the order of modules"
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "gradpruner" or len(parts) < 2:
                continue
            there = parts[1]
            later = ORDER.index(there) > ORDER.index(here)
            if later and (here, there) not in ALLOWED:
                wrong.append(f"{here} imports {there}")
    assert not wrong


@pytest.mark.parametrize("name", PURE)
def test_tensor_modules_do_not_know_transformers(name: str) -> None:
    assert not {"transformers", "peft"} & {n.split(".")[0] for n in imported(PACKAGE / f"{name}.py")}


def test_public_names_are_sorted_exist_and_say_what_they_are() -> None:
    assert gradpruner.__all__ == sorted(gradpruner.__all__)
    for name in gradpruner.__all__:
        value = getattr(gradpruner, name)
        assert value is not None
        if name != "__version__":
            assert value.__doc__, f"{name} has no docstring"
            assert value.__module__.startswith("gradpruner.")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    code = f"import gradpruner, gradpruner.cli, sys; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gradpruner.nonsense  # noqa: B018
