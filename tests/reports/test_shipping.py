"""Which model of a run is the one to ship."""

from typing import Any

import pytest

from gradpruner.cli.suggestions import suggest_after_run
from gradpruner.common.errors import ConfigError
from gradpruner.reports.shipping import advice, model_to_ship
from gradpruner.reports.view import read


def row(size: int, test: float, validation: float | None = None, **more: Any) -> dict[str, Any]:
    measured = {"metrics": {"exact_match": {"value": test}}}
    also = {} if validation is None else {"validation": {"metrics": {"exact_match": {"value": validation}}}}
    found = {"plan": "a plan", "num_parameters": size, "evaluation": measured, "also": also, "error": None}
    return found | more


def record(**variants: dict[str, Any]) -> dict[str, Any]:
    asked = {name: name for name in variants if "@" not in name}
    return {"variants": variants, "rows": asked, "model": {"path": "given/model"}}


DENSE = row(100, 0.9, 0.99, plan=None, finetune={"output": "variants/dense/model"})


def test_the_best_on_validation_rows_is_taken_whatever_the_test_rows_say() -> None:
    run = record(
        dense=DENSE, merged=row(60, 0.9, 0.7), dropped=row(60, 0.5, 0.8), longer=row(100, 1, 1, plan=None)
    )
    found = model_to_ship(run)
    assert (found.row, found.folder) == ("dropped", "variants/dropped/pruned")
    assert "80.0%" in found.reason and "validation" in found.reason


def test_without_validation_rows_test_rows_do_not_decide_either() -> None:
    run = record(dense=DENSE, dropped=row(60, 0.9), merged=row(60, 0.5))
    found = model_to_ship(run)
    assert found.row == "merged" and "nothing was compared" in found.reason


def test_after_a_run_of_the_dense_model_alone_shrink_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run = record(dense=DENSE)
    found = advice(read(run))
    assert found is not None and "gradpruner shrink" in found.reason
    run |= {"rows": {"dense": "dense"}, "plans": {}}
    suggest_after_run("report", run, "tuned")
    said = "".join(capsys.readouterr())
    assert "gradpruner shrink tuned/variants/dense/model" in said and "num-prune" not in said


def test_of_a_row_that_is_clearly_worse_it_is_said_what_keeps_more() -> None:
    def said(change: float) -> str:
        paired = {"task": {"exact_match": {"value": change, "low": change - 0.1, "high": change + 0.1}}}
        found = advice(read(record(dense=DENSE, dropped=row(60, 0.9 + change, paired=paired))))
        assert found is not None
        return f"{found.title} {found.reason}"

    assert "clearly worse" in said(-0.4) and "plan.max_loss" in said(-0.4)
    assert "worse" not in said(0.0) and "plan.max_loss" not in said(0.0)


def test_rows_of_other_plans_must_fit_the_budget() -> None:
    run = record(merged=row(60, 0.9, 0.7), dropped=row(59, 0.9, 0.7))
    run["variants"] |= {"merged@num_prune=1": row(90, 0.9, 0.95), "merged@num_prune=9": row(50, 0.9, 0.75)}
    assert model_to_ship(run).row == "merged@num_prune=9"


def test_a_row_may_be_named_and_failed_or_unfinished_ones_are_no_choice() -> None:
    run = record(
        dense=DENSE, merged=row(60, 0.9, error="out of memory"), dropped=row(60, 0.8, evaluation=None)
    )
    with pytest.raises(ConfigError, match="no evaluated pruned model"):
        model_to_ship(run)
    assert model_to_ship(run, "dense").folder == "variants/dense/model"
    with pytest.raises(ConfigError, match="'merged' failed") as caught:
        model_to_ship(run, "merged")
    assert caught.value.hint == "Variants with a model: dense, dropped."
    run["variants"]["dense"]["finetune"] = None
    assert model_to_ship(run, "dense").folder == "given/model"
