import errno
import json
import os
import stat
import threading
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from gradpruner.common import files
from gradpruner.common.errors import IntegrityError, ResourceError
from gradpruner.common.files import (
    check_free_space,
    folder_bytes,
    open_private,
    refuse_links,
    save_tensors,
    staging,
    sweep,
    write_text,
)
from gradpruner.common.json_files import parse_json, read_json, read_object, write_json


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


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a": NaN}', "NaN"), ("[-Infinity]", "Infinity"), ("[1e999]", "1e999"),
        ('["\\ud800"]', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"), ("[" * 100 + "]" * 100, "64 levels"), ("[" * 10**5, "64 levels"),
        ("9" * 5000, "5000 digits"), ("[18446744073709551616]", "20 digits"), ('{"a": 1, "a": 2}', "twice"),
        ("", "Expecting value"), ("{", "line 1 column 2"),
    ],
)  # fmt: skip
def test_json_that_nobody_could_go_on_with(tmp_path, text, part):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(IntegrityError, match=rf"a\.json is not a readable thing: .*{part}"):
        read_json(tmp_path / "a.json", "thing")


def test_json_that_is_fine():
    good = {"a": [1, -1.5, None, True, "\U0001f600", 2**64 - 1, -(2**63)], "b": {"c": []}}
    assert parse_json(json.dumps(good)) == good
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(good).encode()) == good
    assert parse_json("[" * 63 + "]" * 63) is not None


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(IntegrityError):
            read_json(path, "thing")


@dataclass(frozen=True)
class Shape:
    count: int
    names: tuple[str, ...] = ()
    share: float = 0.0


def test_a_typed_file_names_the_field_that_is_wrong(tmp_path):
    path = tmp_path / "a.json"
    for value, part in (
        ([], "top level"),
        ({}, "count: Field required"),
        ({"count": "1"}, r"count: .*valid integer .given: '1'."),
        ({"count": True}, "count"),
        ({"count": 1, "names": ["a", 5]}, r"names.1"),
        ({"count": 1, "share": "x\n" * 99}, "share"),
    ):
        write_json(path, value)
        with pytest.raises(IntegrityError, match=part) as caught:
            read_object(path, "thing", Shape)
        assert "\n" not in str(caught.value)
    write_json(path, {"count": 1, "names": ["a"], "share": 2})
    assert read_object(path, "thing", Shape) == Shape(1, ("a",), 2.0)


def test_what_nobody_holds_is_swept_and_what_is_being_written_is_not(tmp_path):
    write_text(tmp_path / ".a.txt.0123456789abcdef.part", "left by a killed writer")
    (tmp_path / ".b.0123456789abcdef.part").mkdir()
    (tmp_path / ".c.0123456789abcdef.part").symlink_to(tmp_path / "kept")
    write_text(tmp_path / "kept", "x")
    write_text(tmp_path / "examples.jsonl.part", "a journal, to be gone on with")
    with staging(tmp_path / "a.txt") as file, staging(tmp_path / "b", folder=True) as folder:
        assert len(sweep(tmp_path)) == 2
        assert file.exists() and folder.is_dir()
    assert names(tmp_path) == [".c.0123456789abcdef.part", "examples.jsonl.part", "kept"]


def test_many_writers_of_one_file_leave_one_whole_content(tmp_path):
    def write(letter):
        for _ in range(5):
            write_text(tmp_path / "a.txt", letter * 1000)
            sweep(tmp_path)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "a.txt").read_text()
    assert text == text[0] * 1000 and names(tmp_path) == ["a.txt"]


def test_a_file_in_a_strangers_folder_is_not_written_through(tmp_path):
    victim = tmp_path / "thesis.txt"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(victim)
    (run / "dangling").symlink_to(tmp_path / "new")
    os.link(victim, run / "second")
    os.mkfifo(run / "pipe")
    for name in ("link", "dangling", "second", "pipe"):
        with pytest.raises(IntegrityError, match="so nothing is written to it"):
            open_private(run / name)
    with open_private(run / "fresh") as file:
        file.write("x")
    assert victim.read_text() == "precious" and not (tmp_path / "new").exists()
    with pytest.raises(IntegrityError, match="is a link out of the folder"):
        refuse_links(run)


def test_links_that_stay_inside_are_no_danger(tmp_path):
    (tmp_path / "run" / "a").mkdir(parents=True)
    (tmp_path / "run" / "b").symlink_to("a")
    refuse_links(tmp_path / "run")
    (tmp_path / "run" / "c").symlink_to("..")
    with pytest.raises(IntegrityError):
        refuse_links(tmp_path / "run")


def test_a_name_that_is_too_long_is_said_to_be(tmp_path):
    write_text(tmp_path / ("x" * 255), "x")
    with pytest.raises(ResourceError, match="shorter name"):
        write_text(tmp_path / ("x" * 256), "x")


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
    with pytest.raises(ResourceError, match=r"This run needs 909 TiB in .*yet; .* [GT]iB are free"):
        check_free_space(tmp_path / "not" / "yet", 10**15, "This run")


def test_bytes_of_a_folder_leave_out_what_vanishes_and_what_is_asked(tmp_path):
    for name, size in (("a", 3), ("b/c", 5), ("model/w", 7)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "b" / "gone").symlink_to(tmp_path / "nowhere")  # as a file that vanishes after it was listed
    assert folder_bytes(tmp_path) == 15
    assert folder_bytes(tmp_path, without=tmp_path / "model") == 8
    assert folder_bytes(tmp_path, without=tmp_path) == folder_bytes(tmp_path / "nowhere") == 0
