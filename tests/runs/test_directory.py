import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import make_project
from processes import RUN_PATH, ended

from gradpruner.common.errors import ConfigError, DataError, IntegrityError, ResourceError
from gradpruner.common.files import working_in
from gradpruner.runs.folder.directory import MANIFEST, RunDirectory, Stage


class Work:
    """A stage that counts how often it is done."""

    def __init__(self, folder, name="a.txt", error=None):
        self.path, self.count, self.error = folder / name, 0, error

    def __call__(self):
        self.count += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f"{self.count}")
        if self.error is not None:
            raise self.error
        return {"value": self.count}


def manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


def test_a_stage_is_done_once(tmp_path):
    work = Work(tmp_path / "run")
    for state in ("done", "skipped", "skipped"):
        with RunDirectory(tmp_path / "run") as directory:
            assert directory.ensure(Stage("work", {"x": 1}, work, ["a.txt"])) == {"value": 1}
            assert directory.visited == {"work": state}
    assert work.count == 1


@pytest.mark.parametrize("change", ["inputs", "content", "size", "gone"])
def test_a_stage_is_done_again_when_anything_changed(tmp_path, change):
    folder = tmp_path / "run"
    work = Work(folder)
    with RunDirectory(folder) as directory:
        directory.ensure(Stage("work", {"x": 1}, work, ["a.txt"]))
    if change == "content":
        (folder / "a.txt").write_text("2")
    elif change == "size":
        (folder / "a.txt").write_text("longer")
    elif change == "gone":
        (folder / "a.txt").unlink()
    with RunDirectory(folder) as directory:
        directory.ensure(Stage("work", {"x": 2 if change == "inputs" else 1}, work, ["a.txt"]))
    assert work.count == 2


def test_the_manifest_says_what_was_done_with_what(tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        directory.describe({"seed": 1}, {"model": "abc"})
        directory.ensure(Stage("work", {"x": 1}, Work(tmp_path / "run"), ["a.txt"]))
    found = manifest(tmp_path / "run")
    assert found["config"] == {"seed": 1} and found["inputs"] == {"model": "abc"}
    assert found["created"].endswith("Z") and found["gradpruner_version"]
    stage = found["stages"]["work"]
    assert stage["state"] == "done" and stage["result"] == {"value": 1}
    assert stage["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in stage["versions"]["torch"]
    assert stage["seconds"] >= 0 and stage["peak_memory_bytes"] > 0
    assert len(stage["inputs"]) == 64 and len(stage["files"]["a.txt"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("error", "state"),
    [(DataError("bad"), "failed"), (ValueError("bug"), "failed"), (KeyboardInterrupt(), "interrupted"),
     (SystemExit(143), "interrupted")],
)  # fmt: skip
def test_a_failed_stage_is_marked_and_cleared_before_the_next_try(tmp_path, error, state):
    folder = tmp_path / "run"
    with pytest.raises(type(error)), RunDirectory(folder) as directory:
        directory.ensure(Stage("work", 1, Work(folder, "out/half.txt", error), ["out"]))
    assert manifest(folder)["stages"]["work"]["state"] == state
    work = Work(folder, "out/whole.txt")
    with RunDirectory(folder) as directory:
        directory.ensure(Stage("work", 1, work, ["out"]))
    assert [p.name for p in (folder / "out").iterdir()] == ["whole.txt"] and work.count == 1


def test_partial_output_stays_for_a_stage_that_resumes(tmp_path):
    for inputs, expected in ((1, ["half.txt", "whole.txt"]), (2, ["whole.txt"])):
        folder = tmp_path / f"run{inputs}"
        with pytest.raises(KeyboardInterrupt), RunDirectory(folder) as directory:
            directory.ensure(Stage("work", 1, Work(folder, "out/half.txt", KeyboardInterrupt()), ["out"]))
        with RunDirectory(folder) as directory:
            directory.ensure(Stage("work", inputs, Work(folder, "out/whole.txt"), ["out"], resumes=True))
        assert sorted(p.name for p in (folder / "out").iterdir()) == expected


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/rows"), "'/rows' cannot be used: Permission"),
        (OSError("Stale handle"), "^OSError: Stale handle"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "Cannot write"),
        (MemoryError(), "Lower the batch size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Lower the batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "Lower the batch size"),
    ],
)
def test_a_full_disk_or_memory_is_reported_in_plain_words(tmp_path, error, part):
    with pytest.raises(ResourceError, match=part), RunDirectory(tmp_path / "run") as directory:
        directory.ensure(Stage("work", 1, Work(tmp_path / "run", error=error), ["a.txt"]))


def test_foreign_folders_are_refused_and_untouched(tmp_path):
    mine, source = tmp_path / "mine", tmp_path / "source"
    for folder in (mine, source):
        folder.mkdir()
        (folder / "thesis.tex").write_text("x")
    for out, inputs, part in (
        (mine, (), "not empty and was not made by gradpruner"),
        (mine / "thesis.tex", (), "is a file"),
        (source, (source,), "is the input"),
        (source / "run", (source,), "lies inside it"),
        (source / ".." / "source" / "run", (source,), "lies inside it"),
    ):
        with pytest.raises(ConfigError, match=part) as caught:
            RunDirectory(out, inputs=inputs)
        assert "another output folder" in str(caught.value) and caught.value.exit_code == 2
    assert [p.name for p in (*mine.iterdir(), *source.iterdir())] == ["thesis.tex"] * 2
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".lock").write_text("1")  # killed before its first file was written
    with RunDirectory(tmp_path / "killed"):
        pass


def test_two_processes_cannot_share_a_run_directory(tmp_path):
    with RunDirectory(tmp_path / "run"):
        code = (
            "import fcntl, sys; f = open(sys.argv[1], 'a+')\n"
            "try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except OSError: sys.exit(7)"
        )
        held = subprocess.run([sys.executable, "-c", code, tmp_path / "run" / ".lock"], check=False)
        assert held.returncode == 7
        with pytest.raises(ConfigError, match=r"in use by process \d+"):
            RunDirectory(tmp_path / "run").__enter__()
    with RunDirectory(tmp_path / "run"):
        pass


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run directory with a record, a study of it, and the model."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, variants=["dense", "merged"])
    with RunDirectory(folder / "run"):
        pass
    (folder / "run/run.json").write_text('{"variants": {}}')
    (folder / "run/recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace('"./', f'"{folder}/')
    )
    (folder / "study").mkdir()
    (folder / "study/study.yaml").write_text("")
    return folder


OF_A_STUDY = ("--methods", "last", "--seeds", "0,1")


@pytest.mark.parametrize(
    "command",
    [
        *[(name, "--out", "run") for name in ("run", "record", "score", "plan", "prune", "finetune")],
        ("evaluate", "--out", "run"),
        ("evaluate", "model", "--eval-data", "eval.jsonl", "--out", "run"),
        ("shrink", "model", "--data", "train.jsonl", "--eval-data", "eval.jsonl", "--out", "run", "--set",
         "record.steps=4"),
        ("report", "run"),
        ("compare", "recipe.yaml", *OF_A_STUDY, "--out", "study"),
        ("ablate", "sweep.yaml", *OF_A_STUDY, "--out", "study"),
    ],
)  # fmt: skip
def test_a_second_process_is_refused_by_every_command_that_writes(project, call, monkeypatch, command):
    monkeypatch.chdir(project)
    (project / "sweep.yaml").write_text("base: recipe.yaml\nsweep: {key: plan.num_merge, values: [0, 1]}\n")
    folder = project / command[command.index("--out") + 1 if "--out" in command else 1]
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with working_in(folder):
        code, _, err = call(*command)
        lines = [line for line in err.splitlines() if "error" in line or "Traceback" in line]
        assert code == 2 and f"in use by process {os.getpid()}" in lines[0] and len(lines) == 1
        assert {path: path.read_bytes() for path in before if path.name != ".lock"} == {
            path: content for path, content in before.items() if path.name != ".lock"
        }
        if "--out" in command and command[:2] != ("evaluate", "model"):
            code, _, err = call(*command, "--dry-run")
            assert code == 0, err


def test_processes_with_seeds_of_their_own_may_share_a_study(project):
    study = project / "study"
    with working_in(study, shared=True), working_in(study, ".lock-seed-0"):
        with working_in(study, shared=True), working_in(study, ".lock-seed-1"):
            pass
        with pytest.raises(ConfigError, match="in use by process"):
            working_in(study, ".lock-seed-0").__enter__()
        with pytest.raises(ConfigError, match="in use by process"):
            working_in(study).__enter__()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    code, said, errors = ended(RUN_PATH, script, "--kills", 3, "--seed", 1, "--variants", "merged")
    assert code == 0 and "3 kills in" in said, said + errors[-2000:]


def test_the_time_of_a_resumed_stage_adds_up(tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # every attempt takes a second
    monkeypatch.setattr("gradpruner.runs.folder.directory.time", clock)

    def attempt(error=None):
        if error:
            raise error
        return {}

    folder = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), RunDirectory(folder) as directory:
            directory.ensure(Stage("work", 1, lambda: attempt(KeyboardInterrupt()), ["out"], resumes=True))
    with RunDirectory(folder) as directory:
        directory.ensure(Stage("work", 1, attempt, ["out"], resumes=True))
        directory.ensure(Stage("other", 1, attempt, ["out"]))
    stages = manifest(folder)["stages"]
    assert stages["work"]["seconds"] == 3 and stages["work"]["resumed"]
    assert stages["other"]["seconds"] == 1 and not stages["other"]["resumed"]


def run_folder(folder):
    with RunDirectory(folder) as directory:
        directory.ensure(Stage("work", 1, Work(folder, "out/a.txt"), ["out"]))
    return folder


@pytest.mark.parametrize("where", [".lock", "out/a.txt", "out", "deep"])
def test_nothing_is_written_through_a_link_that_came_with_a_run_folder(tmp_path, where):
    run, outside = run_folder(tmp_path / "run"), tmp_path / "mine"
    outside.mkdir()
    (outside / "thesis.txt").write_text("precious")
    link = run / where
    if link.is_dir():
        link.rename(tmp_path / "moved")
    link.unlink(missing_ok=True)
    link.symlink_to(outside / "thesis.txt" if link.suffix or where == ".lock" else outside)
    with pytest.raises(IntegrityError, match="so nothing is written to it") as caught:
        RunDirectory(run).__enter__()
    assert str(link) in str(caught.value)
    assert (outside / "thesis.txt").read_text() == "precious" and len(list(outside.iterdir())) == 1


def test_a_lock_that_is_another_name_of_a_file_is_not_emptied(tmp_path):
    run, victim = run_folder(tmp_path / "run"), tmp_path / "thesis.txt"
    victim.write_text("precious")
    (run / ".lock").unlink()
    os.link(victim, run / ".lock")
    with pytest.raises(IntegrityError, match="a hard link to another file"):
        RunDirectory(run).__enter__()
    assert victim.read_text() == "precious"


def test_what_killed_writers_left_in_a_run_folder_is_swept(tmp_path):
    run = run_folder(tmp_path / "run")
    (run / ".manifest.json.0123456789abcdef.part").write_text("{")
    (run / "out" / ".model.0123456789abcdef.part").mkdir()
    (run / "out" / "examples.jsonl.part").write_text("a journal")
    with RunDirectory(run):
        pass
    assert sorted(p.name for p in run.rglob("*.part")) == ["examples.jsonl.part"]


@pytest.mark.parametrize("relative", ["../x", "/etc/hostname", "a\0b", "x" * 300])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, relative):
    run = run_folder(tmp_path / "run")
    found = manifest(run)
    found["stages"]["work"]["files"] = {relative: {"bytes": 1}}
    (run / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(IntegrityError, match="which is not in the folder"):
        RunDirectory(run).__enter__()


@pytest.mark.parametrize(
    "content", ['{"format_version": 99, "stages": {}}', "[]", '{"format_version": 1}', '{"format']
)
def test_a_damaged_manifest_is_refused(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / MANIFEST).write_text(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        RunDirectory(folder).__enter__()
    assert (folder / MANIFEST).read_text() == content


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((ResourceError, ConfigError)):
        RunDirectory(tmp_path / "file" / "run").__enter__()
