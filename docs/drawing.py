"""What the modules that write figures share: reading results, formatting numbers, loading benchmarks, drawing."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"


def script(name: str) -> Any:
    """Imports a script of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def digest(value: Any) -> str:
    """Hash of the data a drawing shows, stored in it as a comment. The drawing itself may differ by version."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def plotting() -> Any:
    """Returns matplotlib.pyplot, configured so that the same data makes the same file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "gradpruner", "svg.fonttype": "none"})
    return pyplot


def as_svg(figure: Any, shown: str) -> str:
    """Returns a figure as SVG with the digest of its data, and closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    plotting().close(figure)
    return buffer.getvalue() + f"<!-- {shown} -->\n"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def machine(result: dict[str, Any]) -> str:
    facts = result["provenance"]["machine"]
    return f"{facts['cores']} core{'s'[: facts['cores'] != 1]} of an {facts['cpu']}"


def dig(value: Any, path: str) -> Any:
    """The entry under a path of keys; None where one is missing."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def times(value: float) -> str:
    return f"{value:.2f}x"
