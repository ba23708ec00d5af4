import io
import re

import pytest
from transformers import TrainerState

from gradpruner.common.progress import Progress, clock_text, set_mode, track
from gradpruner.training.callbacks import ProgressCallback


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def automatic_mode():
    set_mode("auto")
    yield
    set_mode("auto")


def lines_of(total, seconds_per_unit, description="finetune merged", **fields):
    clock, stream = Clock(), io.StringIO()
    with Progress(total, description, stream=stream, clock=clock) as bar:
        for step in range(1, total + 1):
            clock.now += seconds_per_unit
            bar.update(step, **fields)
    return stream.getvalue().splitlines()


def test_plain_lines_off_a_terminal():
    lines = lines_of(120, 0.5, loss=1.23)
    # 5 s are 10 steps. A tenth (12 steps) comes later, so the wait decides.
    assert lines[0] == "finetune merged 10/120 loss 1.23 ETA 00:55"
    assert lines[3] == "finetune merged 40/120 loss 1.23 ETA 00:40"
    assert lines[-1] == "finetune merged 120/120 loss 1.23 done in 01:00"
    assert len(lines) == 12


def test_a_tenth_more_makes_a_line_before_the_wait_is_over():
    lines = lines_of(10, 2.0)
    assert lines[0] == "finetune merged 1/10 ETA 00:18"
    assert len(lines) == 10


def test_quick_work_is_one_line():
    assert lines_of(1000, 0.0001) == ["finetune merged 1000/1000 done in 00:00"]


def test_long_runs_print_few_lines():
    assert len(lines_of(36_000, 1.0)) < 150  # Ten hours.


def test_resumed_work_does_not_count_in_the_speed():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, "train", stream=stream, clock=clock) as bar:
        bar.skip(80)
        clock.now = 10.0
        bar.update(90)
    assert stream.getvalue().splitlines()[0] == "train 90/100 ETA 00:10"


def test_a_training_that_goes_on_counts_from_where_it_stopped():
    callback, state = ProgressCallback("train"), TrainerState(global_step=80, max_steps=100)
    callback.on_train_begin(None, state, None)
    assert callback._progress.completed == 80 and callback._progress.seconds_left() is None
    callback.close()


def test_a_failure_is_not_called_done():
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress(5, "train", stream=stream) as bar:
        bar.advance(2)
        raise KeyError("x")
    assert stream.getvalue() == "train 2/5 stopped after 00:00\n"


def test_quiet_writes_nothing():
    set_mode("quiet")
    assert lines_of(100, 10.0) == []


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(4, "score [llama]", stream=stream) as bar:
        bar.skip(2)
        for step in range(3, 5):
            bar.update(step, loss=0.123456, note="[red]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "score [llama]" in text
    assert "4/4" in text
    assert "loss 0.1235 note [red]" in text


def test_bars_may_be_nested(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(2, "outer", stream=stream) as outer:
        with Progress(3, "inner", stream=stream) as inner:
            inner.advance(3)
        outer.advance(2)
    assert (outer.completed, inner.completed) == (2, 3)


def test_track_counts_and_yields(capsys):
    assert list(track(["a", "b", "c"], "letters")) == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["letters 3/3 done in 00:00"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (41.4, "00:41"), (3599.6, "1:00:00"), (36061, "10:01:01")]
)
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text
