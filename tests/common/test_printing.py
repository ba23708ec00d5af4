"""Plans, scores, repairs and traces print as tables people can read; a notebook shows the same as HTML."""

import io
import sys

import pytest
import torch
from rich.console import Console

from gradpruner.common.printing import SUBSTITUTE, num_bytes, print_line, runs_of
from gradpruner.gradients.scores import LayerScores
from gradpruner.gradients.trace import GradientTrace, LinearRef, TraceInfo
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.repair import Repair, RepairedCut
from gradpruner.plans.width_plan import LayerWidths, WidthPlan, WidthShape

ACTIONS = [("keep",), ("keep",), ("merge", 1), ("drop",), ("keep",), ("drop",)]
SHOWN = [
    (
        PruningPlan(tuple(LayerAction(*action) for action in ACTIONS), method="[red]<b>"),
        ["Plan ([red]<b>): 3 of 6 layers stay", "kept 0-1, 4 3", "dropped 3, 5 2", "merged into 1 (sum) 2 1"],
    ),
    (
        WidthPlan(
            WidthShape(2, 8, 4, 2, 2, 16),
            (LayerWidths((0, 1), (0, 1, 2)), LayerWidths((0, 1, 2, 3), (0, 1))),
            tuple(range(8)),
        ),
        ["all 2 layers stay and become narrower", "query heads 4 2 to 4", "MLP channels 16 2 to 3"],
    ),
    (
        LayerScores("gradpruner", (4.0, 2e-9, 1.0), (3.0, 1e-9, 0.5), (5.0, 3e-9, 2.0)),
        ["1 2e-09 1e-09 3e-09 0.0%", "2 1 0.5 2 25.0%", "0 4 3 5 100.0%"],
    ),
    (
        Repair(
            "least_squares",
            (3, 6),
            (
                RepairedCut(2, "mlp.down_proj", (3,), 0.1, 0.5, 0.2),
                RepairedCut(5, "mlp.down_proj", (6,), None, 0.5, 0.5),
            ),
            {2: torch.ones(2, 2)},
            rows=3,
            tokens=12,
            notes=("hm",),
        ),
        ["2 mlp.down_proj 3 50.0% 20.0%", "5 mlp.down_proj 6 50.0% unchanged", "Note: hm"],
    ),
    (
        GradientTrace(TraceInfo(2, (LinearRef(0, "a", 4, 4, 2),), losses=(3.0, 2.0)), torch.ones(3, 1)),
        ["steps 3, 3 of them with energy", "loss 3 at the start, 2 at the end", "factors, for merging no"],
    ),
]


@pytest.mark.parametrize(("found", "lines"), SHOWN, ids=lambda found: type(found).__name__)
def test_what_is_printed_is_a_table_of_what_it_is(found, lines, monkeypatch):
    shown = [" ".join(line.split()) for line in str(found).splitlines()]
    assert [line for line in lines if not any(line in one for one in shown)] == []
    page = found._repr_html_()
    assert page.count("<table>") == 1 and "<b>" not in page
    assert all(word in page for word in lines[-1].split() if word.isalnum())
    monkeypatch.setattr(sys, "stdout", open("/dev/null", "w", encoding="ascii"))  # noqa: SIM115
    assert str(found).isascii()


def test_a_console_without_unicode_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=SUBSTITUTE)
    print_line(Console(file=stream, width=80), f"{num_bytes(2**34)} – 2×, [red]é")
    print(f"{num_bytes(2**34)} – ⟦2×⟧ é", file=stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"16.0 GiB - 2x, [red]?\n16.0 GiB - [2x] ?\n"


@pytest.mark.parametrize("numbers, text", [((), "none"), ((3,), "3"), ((1, 2, 3, 7, 9, 10), "1-3, 7, 9-10")])
def test_runs_of(numbers, text):
    assert runs_of(numbers) == text
