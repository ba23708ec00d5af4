"""What is published: sdist and wheel hold everything and work elsewhere; the site has every page."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A new environment that the wheel is installed in, built from the sdist; packages it needs are lent."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "gradpruner", source / "gradpruner", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *alone, "-w", folder, sdist], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    return folder / "venv"


def test_the_wheel_holds_every_file_of_the_package(installed):
    (unpacked,) = installed.glob("lib/python*/site-packages")
    files = [path.relative_to(ROOT) for path in (ROOT / "gradpruner").rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert len(files) > 100
    assert [str(path) for path in files if not (unpacked / path).exists()] == []


def test_the_demo_can_be_started_outside_the_repository(installed, tmp_path):
    done = subprocess.run(
        [installed / "bin" / "gradpruner", "run", "demo", "--dry-run", "--out", "runs/demo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "layers" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(shutil.which("hadolint", path=Path(sys.executable).parent) is None, reason="no hadolint")
def test_the_dockerfile_has_no_fault():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


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
