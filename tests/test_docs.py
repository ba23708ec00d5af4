"""Figures in the documents are those of the committed JSON, and links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "LOG.md"]


def test_figures_are_rendered_from_the_committed_json() -> None:
    done = subprocess.run(
        [sys.executable, "docs/render.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").rglob("*.json")), ids=lambda p: p.stem
)
def test_results_say_where_they_come_from(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert '"provenance"' in text
    for key in ("commit", "dirty", "packages", "machine", "seed"):
        assert f'"{key}"' in text
    assert not re.search(r'"/(home|root|work|tmp)/', text)
