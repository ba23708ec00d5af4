"""The interval behind every figure of docs/quality.md, and the rule that keeps a recovery."""

import importlib
import random
import statistics
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("quality_cells")


def cell(name, task, seed, rows, **validation):
    entry = {"key": f"{task}/{seed}/{name}", "task": task, "seed": seed, "cell": name}
    return entry | {
        "test": {"rows": rows, "score": statistics.mean(map(int, rows))},
        "validation": validation,
    }


def test_the_interval_is_that_of_runs_drawn_first_and_then_their_rows(quality, monkeypatch):
    rows = random.Random(1)
    scores = [["".join(rows.choice("0111") for _ in range(40)) for _ in range(2)] for _ in range(3)]
    found = [
        (cell("dense/0.1", "trec", i, whole), cell("small", "trec", i, small))
        for i, (whole, small) in enumerate(scores)
    ]
    known = {one["key"]: one for pair in found for one in pair}
    monkeypatch.setattr(quality, "cells", lambda: known)
    quality._bootstrap.cache_clear()
    mean, low, high = quality.loss([("trec", i, *pair) for i, pair in enumerate(found)])
    ratios = [small.count("1") / whole.count("1") - 1 for whole, small in scores]
    assert mean == pytest.approx(statistics.mean(ratios))

    def drawn():
        places = [rows.randrange(40) for _ in range(40)]
        whole, small = (sum(text[i] == "1" for i in places) for text in rows.choice(scores))
        return small / whole - 1

    plain = sorted(statistics.mean(drawn() for _ in range(3)) for _ in range(4000))
    assert low == pytest.approx(plain[100], abs=0.03) and high == pytest.approx(plain[3900], abs=0.03)
    quality._bootstrap.cache_clear()


@pytest.mark.parametrize(("after", "kept"), [(0.1, "train"), (0.21, "train"), (2.0, "shrink")])
def test_a_recovery_counts_unless_it_is_clearly_worse(quality, monkeypatch, after, kept):
    noise = [0.05 * (i % 3 - 1) for i in range(60)]
    before = [0.2 + 0.1 * (i % 2) for i in range(60)]
    losses = [after + 0.1 * (i % 2) + part for i, part in enumerate(noise)]
    trained = f"train/{quality.RECOVERED['igia']}/12/0.05"  # half of the dense model's rate
    entries = [
        cell("dense/0.1", "sst2", 0, "1111", nll=0.1) | {"training": {"rate": 0.1}},
        cell("shrink/igia/12/influence", "sst2", 0, "0111", nll=0.2),
        cell("shrink/gate/12/influence", "sst2", 0, "0011", nll=0.3),
        cell(trained, "sst2", 0, "1111", nll=after, losses=losses) | {"before": {"losses": before}},
    ]
    monkeypatch.setattr(quality, "cells", lambda: {one["key"]: one for one in entries})
    quality.dense_of.cache_clear()
    ((task, seed, dense, entry),) = quality.better()
    quality.dense_of.cache_clear()
    assert (task, seed, dense) == ("sst2", 0, entries[0]) and entry["cell"].startswith(kept)
