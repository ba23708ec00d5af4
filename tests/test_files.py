import errno
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from gradpruner import files
from gradpruner.errors import IntegrityError, ResourceError
from gradpruner.files import check_free_space, read_json, save_tensors, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"ä": [1, 2.5, None]})
    assert read_json(tmp_path / "deep" / "a.json", "thing") == {"ä": [1, 2.5, None]}
    save_tensors(tmp_path / "t.safetensors", {"x": torch.arange(3)}, {"k": "v"})
    assert load_file(tmp_path / "t.safetensors")["x"].tolist() == [0, 1, 2]
    assert names(tmp_path) == ["deep", "t.safetensors"] and names(tmp_path / "deep") == ["a.json"]


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "x")
        save_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, error):
    write_text(tmp_path / "a.txt", "old")
    save_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(1)}, {})

    def fail(path):
        raise error

    monkeypatch.setattr(files, "make_durable", fail)
    expected = ResourceError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_text(tmp_path / "a.txt", "new")
    with pytest.raises(expected):
        save_tensors(tmp_path / "t.safetensors", {"x": torch.ones(1)}, {})
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and "free some space" in str(caught.value)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert load_file(tmp_path / "t.safetensors")["x"].item() == 0
    assert names(tmp_path) == ["a.txt", "t.safetensors"]


def test_a_full_disk_is_told_as_one(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    from safetensors import SafetensorError

    found = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert files.is_write_failure(found)
    assert "free some space" in str(files.write_failure(tmp_path, found))
    zipped = RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing file")
    assert files.is_write_failure(zipped)
    assert not files.is_write_failure(RuntimeError("shapes cannot be multiplied"))


def test_damaged_json_names_file_and_place(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(IntegrityError, match=r"no pruning plan at .*plan\.json"):
        read_json(path, "pruning plan")
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(IntegrityError, match=r"plan\.json is not a readable pruning plan: .*line 2 column 7"):
        read_json(path, "pruning plan")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IntegrityError, match="codec"):
        read_json(path, "pruning plan")


def test_free_space_is_looked_at_where_the_folder_will_be(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1, "This run")
    with pytest.raises(ResourceError, match=r"This run needs 1000000\.00 GB in .*yet; .* GB are free"):
        check_free_space(tmp_path / "not" / "yet", 10**15, "This run")
