"""Figures in the documents are those of the committed JSON, and links lead somewhere."""

import re
from pathlib import Path

from processes import RUN_PATH, ended

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "LOG.md"]


def test_figures_are_rendered_from_the_committed_json() -> None:
    # A process of its own: a test that takes a row out of the table of families puts it back at the end.
    code, _, errors = ended(RUN_PATH, ROOT / "docs" / "render.py", "--check")
    assert code == 0, errors


def test_links_lead_to_files() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_sizes_have_binary_units_as_in_the_terminal() -> None:
    sources = sorted((ROOT / "gradpruner").rglob("*.py"))
    for path in [*DOCUMENTS[:-1], *sources]:  # the log keeps what was written at the time
        found = re.findall(r"\d [kMGT]B\b(?!/s)", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}: write KiB, MiB, GiB or TiB"


def test_results_say_where_they_come_from() -> None:
    found = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert found
    for path in found:
        text = path.read_text(encoding="utf-8")
        for key in ("provenance", "commit", "dirty", "packages", "machine", "seed"):
            assert f'"{key}"' in text, f"{path.name}: {key}"
        assert not re.search(r'"/(home|root|work|tmp)/', text), path.name
