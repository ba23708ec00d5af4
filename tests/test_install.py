"""What is published: the wheel holds everything and works outside the repository; the site has every page."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "gradpruner", source / "gradpruner", ignore=shutil.ignore_patterns("__pycache__"))
    build = "pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation"
    subprocess.run([sys.executable, "-m", *build.split(), "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_package(unpacked):
    files = [path.relative_to(ROOT) for path in (ROOT / "gradpruner").rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert len(files) > 100
    assert [str(path) for path in files if not (unpacked / path).exists()] == []


def test_the_demo_can_be_started_outside_the_repository(unpacked, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gradpruner", "run", "demo", "--dry-run", "--out", "runs/demo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "layers" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_the_site_names_every_page():
    def pages(entries):
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages(value)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(site["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_api_page_names_what_is_public():
    import gradpruner

    text = (ROOT / "docs" / "api.md").read_text()
    named = {line.removeprefix("::: gradpruner.") for line in text.splitlines() if line.startswith(":::")}
    assert named == set(gradpruner.__all__) - {"__version__"}
