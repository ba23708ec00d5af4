import hashlib
import json
import re
import subprocess

import pytest

from gradpruner.common import provenance as module
from gradpruner.common.errors import DataError
from gradpruner.common.provenance import (
    hash_folder,
    package_versions,
    provenance,
    sha256_file,
    sha256_json,
    source_state,
    utc_now,
)


def git(folder, *arguments):
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path / "repo", "init", "-q")
    return package


def test_record_is_complete_and_json():
    record = json.loads(json.dumps(provenance(7)))
    assert list(record) == ["commit", "dirty", "python", "packages", "machine", "seed"]
    assert record["seed"] == 7
    assert list(record["machine"]) == ["cpu", "cores", "memory_bytes", "devices", "platform"]
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["memory_bytes"] > 1e8
    assert record["machine"]["devices"]
    assert record["packages"]["torch"]


def test_record_names_no_person_host_or_folder():
    import getpass
    import os
    import platform

    text = json.dumps(provenance(0)["machine"])
    assert os.getcwd() not in text
    for name in (platform.node(), getpass.getuser()):
        assert len(name) < 5 or name not in text


def test_source_state_clean_then_dirty(checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    commit, dirty = source_state(checkout)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    assert dirty is False
    (checkout.parent / "results.json").write_text("{}")  # Outside the sources, so it does not count.
    assert source_state(checkout) == (commit, False)
    (checkout / "new.py").write_text("x = 1")
    assert source_state(checkout) == (commit, True)


def test_no_commit_yet(checkout):
    git(checkout, "add", ".")
    assert source_state(checkout) == (None, None)


def test_a_package_the_repository_does_not_track(checkout):
    git(checkout, "commit", "-q", "--allow-empty", "-m", "somebody else's")
    assert source_state(checkout) == (None, None)


def test_no_git_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_state(tmp_path) == (None, None)


def test_missing_packages_are_left_out():
    assert list(package_versions(["numpy", "no-such-package-anywhere"])) == ["numpy"]


def test_utc_now():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


def test_sha256_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    # The test vector of FIPS 180-2.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(path) == known
    with pytest.raises(DataError, match="missing"):
        sha256_file(tmp_path / "missing")


def test_sha256_json_is_canonical():
    assert sha256_json({"b": 1, "a": [1, "é"]}) == sha256_json({"a": (1, "é"), "b": 1})
    assert sha256_json({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        sha256_json(float("nan"))


def test_hash_folder(tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "a.txt").write_text("a")
        (folder / "sub" / "b.txt").write_text("b")
    one, two = tmp_path / "one", tmp_path / "two"
    assert hash_folder(one) == hash_folder(two)
    assert hash_folder(one) == hash_folder([two / "sub" / "b.txt", two / "a.txt"])
    (two / "a.txt").rename(two / "c.txt")
    assert hash_folder(one) != hash_folder(two)  # Names count.
    (one / "sub" / "b.txt").write_text("B")
    assert hash_folder(one) != hash_folder([one / "a.txt"])
    with pytest.raises(DataError, match="no files"):
        hash_folder([])


def test_hash_folder_keeps_the_name_of_a_link(tmp_path):
    (tmp_path / "blob").write_text("weights")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    linked = hash_folder([folder / "model.safetensors"])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_text("weights")
    assert hash_folder([folder / "model.safetensors"]) == linked


def test_cpu_name_without_proc(monkeypatch):
    monkeypatch.setattr(module.Path, "read_text", lambda *a, **k: (_ for _ in ()).throw(OSError()))
    assert module._cpu_name()
