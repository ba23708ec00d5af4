"""The structure docs/design.md promises, kept by tests."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gradpruner

PACKAGE = Path(gradpruner.__file__).parent
# What every package may import, itself and `common` apart. Nothing runs back up.
ALLOWED: dict[str, str] = {
    "common": "",
    "gradients": "",
    "data": "",
    "plans": "gradients",
    "models": "plans gradients",
    "pruning": "models plans gradients data",
    "training": "models plans gradients data",
    "evaluation": "training models plans data",
    "methods": "training pruning models plans gradients data",
    "reports": "",
    "runs": "methods evaluation training pruning models plans gradients data reports",
    "exports": "runs reports evaluation models plans",
    "cli": "exports runs reports evaluation methods training pruning models plans gradients data",
    "demo": "",
}
# Pure: nothing in them imports transformers or peft.
PURE = [
    *(
        f"{folder}/{path.stem}"
        for folder in ("gradients", "plans")
        for path in (PACKAGE / folder).glob("*.py")
    ),
    "models/engines",
    "models/engine_widths",
    "evaluation/metrics",
    "evaluation/certification",
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def home(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_packages_import_only_what_the_table_allows() -> None:
    wrong = []
    for path in modules():
        here = home(path)
        if here in ("__init__", "__main__"):
            continue
        assert here in ALLOWED, f"{here} has no place in the table of packages"
        allowed = {here, "common", *ALLOWED[here].split()}
        for name in imported(path):
            parts = name.split(".")
            known = len(parts) > 1 and parts[1] in ALLOWED
            if parts[0] == "gradpruner" and known and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_the_table_has_no_circle_and_few_levels() -> None:
    levels: dict[str, int] = {}

    def level(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"{' -> '.join((*above, name))} is a circle"
        if name not in levels:
            below = {"common", *ALLOWED[name].split()} - {name}
            levels[name] = 1 + max((level(n, (*above, name)) for n in below), default=0)
        return levels[name]

    assert max(map(level, ALLOWED)) < 10  # `__main__` stands on top of them
    rooms = {home(path) for path in modules()} - {"__init__", "__main__"}
    assert len(rooms) <= 22 and rooms == {*ALLOWED}


def test_no_file_imports_one_that_imports_it() -> None:
    """Neither at the top nor inside a function nor for types alone."""
    named = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in modules()}
    named = {name.removesuffix(".__init__"): path for name, path in named.items()}
    named.pop("gradpruner")
    order = TopologicalSorter({name: imported(path) & set(named) - {name} for name, path in named.items()})
    order.prepare()  # raises CycleError with the files


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert not {str(path): length for path, length in lengths.items() if length > 400}


def test_every_package_is_described_by_its_docstring() -> None:
    for face in PACKAGE.glob("*/**/__init__.py"):
        folder, name = face.parent, str(face.parent.relative_to(PACKAGE))
        doc = ast.get_docstring(ast.parse(face.read_text(encoding="utf-8")))
        assert doc, name
        for path in folder.glob("*"):
            part = path.stem
            if not part.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file()):
                assert re.search(rf"\b{part}\b", doc), f"the docstring of {name} does not mention {part}"


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


def test_help_tells_every_public_name_in_a_line_before_anything_else() -> None:
    told = re.findall(r"^ {4}(\w+) {2,}\S", gradpruner.__doc__, re.MULTILINE)
    assert sorted([*told, "__version__"]) == gradpruner.__all__ == dir(gradpruner)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    code = f"import gradpruner, gradpruner.cli.main, sys; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gradpruner.nonsense  # noqa: B018
