"""`gradpruner serve`: what it shows of a folder, and what it refuses to."""

import fcntl
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pages import Page

from gradpruner.common.errors import ConfigError
from gradpruner.common.files import LOCK_FILE
from gradpruner.common.progress import Progress
from gradpruner.reports.folders import find_runs
from gradpruner.reports.serving import open_server
from gradpruner.reports.view import read
from gradpruner.runs.folder.directory import RunDirectory, Stage
from gradpruner.runs.folder.pulse import PULSE

EVIL = "<script>alert(1)</script>"


def stage(state: str = "done", **more: object) -> dict[str, object]:
    return {"state": state, "inputs": "x", "files": {}, "seconds": 2.0, **more}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def measured(value: float) -> dict[str, object]:
    return {"metrics": {"exact_match": {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 400}}}


def finished(folder: Path, title: str = "a run", score: float = 0.8) -> None:
    row = {"label": "pruned", "num_parameters": 2_000_000, "evaluation": measured(score)}
    write(folder / "run.json", {"title": title, "variants": {"dropped": row}})
    write(folder / "report.html", f"<p>report of {title}</p>")


def going(folder: Path) -> None:
    """A run in the middle of training its second row, at step 400 of 1,000."""
    losses = [{"step": step, "loss": 3 / step} for step in range(1, 30)]
    stages = {
        "record": stage(result={"losses": [1.0]}),
        "plan merged": stage(result={"parameters": {"before": 10, "after": 6_000_000}}),
        "finetune dense": stage(result={"losses": losses}),
        "evaluate dense": stage(result=measured(0.9)),
        "finetune merged": stage("running"),
    }
    write(folder / "manifest.json", {"format_version": 1, "created": "2026", "stages": stages})
    write(folder / LOCK_FILE, "")
    now = {"stage": "finetune merged", "doing": "finetune merged", "step": 400, "steps": 1000, "loss": 0.5,
           "left": 54_000.0, "began": 1.0, "losses": [[1, 2.0], [400, 0.5]]}  # fmt: skip
    write(folder / PULSE, now)


def study(folder: Path) -> None:
    """A comparison of two runs, one done, and those runs."""
    row = {"name": "last", "label": "Last layers", "metrics": {"exact_match": {"mean": 0.6}},
           "per_seed": [{"seed": 0}, {"seed": 1, "error": "not run yet"}]}  # fmt: skip
    write(folder / "study.json", {"points": [{"rows": [row]}], "runs": {"planned": 2, "finished": 1}})
    finished(folder / "seed-0", score=0.6)
    going(folder / "seed-1")


class Asked:
    """A server in a thread, and what it answers."""

    def __init__(self, folder: Path) -> None:
        self.server = open_server(folder, 0)
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def get(self, path: str = "/", method: str = "GET", host: str | None = "localhost") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        if host is not None:
            connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        self.headers = answer.headers
        page = answer.read().decode()
        connection.close()
        return answer.status, page


def test_runs_are_shown_while_they_go_and_side_by_side(tmp_path: Path) -> None:
    finished(tmp_path / "one", "first", 0.8)
    finished(tmp_path / "deep" / "two", EVIL, 0.7)
    going(tmp_path / "new")
    with Asked(tmp_path) as asked:
        status, html = asked.get()
    words = " ".join(Page(html).words.split())
    assert status == 200 and "2 done, 1 running" in words
    assert "80.0%" in words and "70.0%" in words and "90.0%" in words  # the running run's finished row too
    assert "finetune merged" in words and "400 of 1,000" in words and "15 h 00 min" in words
    assert "Loss so far: new" in words and '<meta http-equiv="refresh" content="5">' in html
    assert EVIL not in html and "&lt;script&gt;" in html and "script" not in Page(html).tags
    links = set(Page(html).references) - {"data:,"}
    assert {link for link in links if not link.startswith("#")} == {"/report/one", "/report/deep/two"}


@pytest.mark.parametrize(
    ("asked", "shown"), [(["rouge_l"], "rouge_l"), (5, "exact_match"), (None, "exact_match")]
)
def test_where_nothing_was_measured_the_metric_asked_for_is_named(asked: object, shown: str) -> None:
    assert read({"recipe": {"evaluate": {"metrics": asked}}}).metric == shown


def test_a_finished_run_says_how_many_of_its_rows_failed(tmp_path: Path) -> None:
    rows = {"a": {"label": "a", "evaluation": measured(0.8)}, "b": {"label": "b", "error": "out of memory"}}
    write(tmp_path / "one" / "run.json", {"title": "one", "variants": rows})
    write(tmp_path / "two" / "run.json", {"title": "two", "variants": {"b": rows["b"]}})
    said = {run.name: (run.state, run.fault) for run in find_runs(tmp_path)[0]}
    assert said == {
        "one": ("done", "1 of 2 rows failed: out of memory"),
        "two": ("failed", "out of memory"),
    }


def test_what_nobody_works_on_any_more_has_stopped(tmp_path: Path) -> None:
    going(tmp_path / "new")
    os.utime(tmp_path / "new" / PULSE, (1e9, 1e9))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with Asked(tmp_path / "new") as asked:
        words = Page(asked.get()[1]).words
    assert "Stopped in finetune merged" in words and "1 stopped" in words and "Running" not in words
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before  # nothing is written


def test_a_study_stands_for_its_runs(tmp_path: Path) -> None:
    study(tmp_path / "compare")
    with Asked(tmp_path) as asked:
        words = " ".join(Page(asked.get()[1]).words.split())
        assert "1 stopped" in words and "Stopped after 1 of 2 runs" in words and "seed-" not in words
        write(
            tmp_path / "compare" / PULSE, {"stage": "run 2 of 2: seed 1", "doing": "finetune last", "step": 3}
        )
        words = " ".join(Page(asked.get()[1]).words.split())
    assert "1 running" in words and "run 2 of 2: seed 1 finetune last" in words and words.count("60.0%") == 1


def test_who_looks_on_is_never_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def lingering(*arguments: object) -> None:
        lock(*arguments)
        time.sleep(0.003)  # a lock, were one taken by who looks on, would meet a start for certain

    monkeypatch.setattr(fcntl, "flock", lingering)
    over, seen = threading.Event(), set()

    def look() -> None:
        while not over.is_set():
            seen.update(run.state for run in find_runs(tmp_path)[0])

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(40):
            with RunDirectory(tmp_path / "run"):
                pass
    finally:
        over.set()
        for looker in lookers:
            looker.join()
    assert seen and {p.name for p in (tmp_path / "run").iterdir()} == {"manifest.json", LOCK_FILE}


def test_a_run_says_what_is_in_hand_and_no_more_when_it_ends(tmp_path: Path) -> None:
    said = []

    def work() -> dict[str, object]:
        with Progress(10, "finetune merged") as progress:
            progress.history = [{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 1}]
            progress.update(4, loss=2.5)
            until = time.monotonic() + 20
            while not said and time.monotonic() < until:
                time.sleep(0.05)
                said.extend(run for run in find_runs(tmp_path)[0] if run.now and run.now.step == 4)
        return {}

    with RunDirectory(tmp_path) as directory:
        directory.ensure(Stage("finetune merged", {}, work))
    now = said[0].now
    assert (now.stage, now.doing, now.steps, now.loss) == ("finetune merged", "finetune merged", 10, 2.5)
    assert said[0].curves == {"merged": [(1.0, 2.5)]} and said[0].state == "running"
    assert not (tmp_path / PULSE).exists()


def test_progress_that_cannot_be_written_harms_nothing(tmp_path: Path) -> None:
    write(tmp_path / "manifest.json", {"format_version": 1, "created": "x", "stages": {}})
    write(tmp_path / PULSE / "mine", "x")
    with RunDirectory(tmp_path) as directory:
        assert directory.ensure(Stage("a", {}, lambda: time.sleep(1.2) or {"x": 1})) == {"x": 1}
    assert (tmp_path / PULSE / "mine").exists() and not list(tmp_path.glob(".progress*"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"stages": ',
        "[1]",
        '{"stages": {"finetune ../../x": {"state": "running"}}}',
        '{"stages": [3]}',
        "\0",
    ],
)
def test_a_damaged_folder_is_said_and_costs_no_other(tmp_path: Path, content: str) -> None:
    finished(tmp_path / "good")
    for name in ("manifest.json", "run.json"):
        write(tmp_path / f"bad-{name}" / "run.json", "{}")
        write(tmp_path / f"bad-{name}" / LOCK_FILE, "")
        write(tmp_path / f"bad-{name}" / name, content)
    write(tmp_path / "good" / PULSE, content)
    with Asked(tmp_path) as asked:
        status, html = asked.get()
    assert status == 200 and "80.0%" in html and "bad-run.json" in html and "bad-manifest.json" in html
    assert "Traceback" not in html and (">damaged<" in html) == (content in ("", '{"stages": ', "[1]", "\0"))


def test_nothing_outside_is_served(tmp_path: Path) -> None:
    secret = tmp_path / "secret.html"
    write(secret, "secret")
    finished(tmp_path / "outside")
    runs = tmp_path / "runs"
    finished(runs / "ok")
    finished(runs / "linked")
    (runs / "linked" / "report.html").unlink()
    (runs / "linked" / "report.html").symlink_to(secret)
    (runs / "way-out").symlink_to(tmp_path / "outside")
    finished(runs / "record")
    (runs / "record" / "run.json").unlink()
    (runs / "record" / "run.json").symlink_to(tmp_path / "outside" / "run.json")
    os.mkfifo(runs / "ok" / "pipe")
    write(runs / "ok" / "run.json.bak", "secret")
    with Asked(runs) as asked:
        assert asked.get("/report/ok") == (200, "<p>report of a run</p>")
        assert "script-src 'sha256-" in asked.headers["Content-Security-Policy"]
        assert asked.get("/report/ok", "HEAD") == (200, "")
        for path in (
            "/report/linked", "/report/way-out", "/report/../outside", "/report/%2e%2e/outside",
            "/report/ok/../../outside", f"/report/{tmp_path}/outside", "/report/ok/run.json", "/report/",
            "/report/ok%00", "/runs/ok", "/../secret.html", "//x/report/ok", "/report/ok/report.html",
        ):  # fmt: skip
            status, page = asked.get(path)
            assert status == 404 and "secret" not in page and "Traceback" not in page, path
        html = asked.get()[1]
        assert (
            "way-out" not in html
            and "/report/linked" not in html
            and "Its record is missing or a link" in html
        )


def test_only_this_machine_and_only_reading(tmp_path: Path) -> None:
    finished(tmp_path / "one")
    with Asked(tmp_path) as asked:
        assert asked.server.server_address[0] == "127.0.0.1"
        for host in ("127.0.0.1", "localhost:9000", "LOCALHOST"):
            assert asked.get(host=host)[0] == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1]", None):
            assert asked.get(host=host)[0] == 403, host
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert asked.get(method=method)[0] == 405
        assert asked.get(method="TRACE")[0] == 501


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "none", "no folder"), (tmp_path, "no runs"), (Path("\0"), "no folder")):
        with pytest.raises(ConfigError, match=words) as error:
            open_server(folder, 0)
        assert "\n" not in str(error.value)
    finished(tmp_path / "one")
    with Asked(tmp_path) as asked, pytest.raises(ConfigError, match=r"Port \d+ cannot be used: .*--port"):
        open_server(tmp_path, asked.server.server_port)


def test_ctrl_c_ends_the_command_quietly(tmp_path: Path) -> None:
    finished(tmp_path / "one")
    command = [sys.executable, "-m", "gradpruner", "serve", str(tmp_path), "--port", "0", "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert re.match(r"http://127\.0\.0\.1:\d+/ shows ", process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr.read() == ""
