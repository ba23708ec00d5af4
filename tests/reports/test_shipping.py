"""Which model of a run is the one to ship."""

from pathlib import Path
from typing import Any

import pytest

from gradpruner.cli.suggestions import suggest_after_run
from gradpruner.common.errors import ConfigError
from gradpruner.reports.markdown import markdown_table
from gradpruner.reports.shipping import Shipped, advice, model_to_ship
from gradpruner.reports.tables import results_table
from gradpruner.reports.view import answer_losses, read


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
    assert found.row == "merged" and "no scores were compared" in found.reason


def test_of_certified_models_the_one_with_the_smallest_limit_is_taken() -> None:
    def plan(limit: float) -> dict[str, Any]:
        return {"search": {"best": 2, "limit": limit, "rows": 80}}

    def taken(**more: Any) -> Shipped:
        second = row(80, 0.9, plan="last@2", **more)
        run = record(dense=DENSE, last=row(60, 0.8, plan="last"), **{"last@2": second})
        return model_to_ship(run | {"plans": {"last": plan(0.4), "last@2": plan(0.1)}})

    assert taken().row == "last@2" and taken().reason.endswith("at most 10.0%.")
    trained = taken(finetune={"output": "variants/last@2/model"})
    assert "holds for the pruned model before it was trained further" in trained.reason
    validated = taken(also={"validation": {"metrics": {"exact_match": {"value": 0.9}}}})
    assert validated.reason.startswith(
        "Of the pruned models certified with the smallest limit, it has the best"
    )
    untrained = {"output": "variants/last@2/model", "kept": {"model": "pruned"}}
    assert "before it was trained" not in taken(finetune=untrained).reason


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

    assert "clearly worse" in said(-0.4) and "recover.epochs=1" in said(-0.4)
    assert "worse" not in said(0.0) and "recover.epochs" not in said(0.0)


def lost(change: float, dense: dict[str, Any] = DENSE, **more: Any) -> dict[str, Any]:
    paired = {"task": {"exact_match": {"value": change, "low": change - 0.1, "high": change + 0.1}}}
    dropped = row(60, 0.9 + change, paired=paired, num_layers=3)
    run = record(dense=dense | {"num_layers": 16}, dropped=dropped, **more)
    return run | {"recipe": {"start": "given", "plan": {"repair": "none"}}}


def test_a_model_that_gets_little_right_is_not_shipped_unless_it_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = lost(-0.9) | {"reference": {"majority_class": 0.3}, "plans": {}}
    with pytest.raises(ConfigError, match="Not good enough to ship") as caught:
        model_to_ship(run)
    for words in (
        "plan.num_prune=6, now 13",
        "plan.repair=auto",
        "recover.epochs",
        "plan.max_loss",
        "--variant",
    ):
        assert words in (caught.value.hint or "")
    assert model_to_ship(run, "dropped").row == "dropped"
    found = advice(read(run), Path("out"))
    assert found is not None and found.row is None and found.heading == "Not good enough to ship"
    assert [step.command for step in found.commands] == ["gradpruner run --out out --num-prune 6"]
    assert "to ship" not in str(results_table(read(run), found.row).lines)
    assert "Model to ship" not in markdown_table(run) and "→" not in markdown_table(run)
    suggest_after_run("report", run, "out")
    assert "on other rows" not in "".join(capsys.readouterr())


def test_how_much_is_too_much_depends_on_the_most_frequent_answer() -> None:
    majority = {"reference": {"majority_class": 0.6}}
    assert model_to_ship(lost(-0.12)) and model_to_ship(lost(-0.12) | majority)
    assert model_to_ship(lost(-0.2))
    with pytest.raises(ConfigError, match="the most frequent answer alone 60"):
        model_to_ship(lost(-0.2) | majority)
    unsure = DENSE | {"evaluation": {"metrics": {"exact_match": {"value": 0.9, "low": 0.8}}}}
    low = lost(-0.12, unsure) | majority
    low["variants"]["dropped"]["evaluation"]["metrics"]["exact_match"]["low"] = 0.55
    with pytest.raises(ConfigError, match="Not good enough"):
        model_to_ship(low)


def test_a_score_that_is_no_accuracy_starts_where_the_model_was_before_tuning() -> None:
    def run(pruned: float, before: float | None, dense: float = 0.25) -> dict[str, Any]:
        def rouge(value: float) -> dict[str, Any]:
            return {"metrics": {"rouge_l": {"value": value}}}

        paired = {"task": {"rouge_l": {"value": pruned - dense, "low": -0.2, "high": -0.01}}}
        small = row(60, 0) | {"evaluation": rouge(pruned), "paired": paired}
        whole = DENSE | {"evaluation": rouge(dense), "before": None if before is None else rouge(before)}
        return record(dense=whole, dropped=small) | {"metrics": ["rouge_l"], "plans": {}}

    assert model_to_ship(run(0.2, None)).row == model_to_ship(run(0.235, 0.15)).row == "dropped"
    with pytest.raises(ConfigError, match=r"Not good enough to ship.*before it was tuned 15"):
        model_to_ship(run(0.17, 0.15))
    found = advice(read(run(0.14, 0.16, dense=0.15)))
    assert found is not None and found.title == "Nothing to ship yet"


def test_the_loss_of_a_student_is_that_on_its_answers() -> None:
    losses = [{"step": 1, "loss": 3.6, "ce": 11.2}, {"step": 2, "loss": 3.5, "ce": 10.8}]
    assert answer_losses(losses) == [(1, 11.2), (2, 10.8)]
    assert answer_losses([{"step": 1, "loss": 3.6}]) == [(1, 3.6)]


def test_another_plan_takes_over_only_from_a_first_one_that_is_not_good_enough() -> None:
    more = {"dropped@num_prune=1": row(90, 0.95)}
    asked = {"rows": {"dense": "dense", "dropped": "dropped@num_prune=1"}}
    assert model_to_ship(lost(0.0, **more) | asked).row == "dropped"
    assert model_to_ship(lost(-0.8, **more) | asked).row == "dropped@num_prune=1"


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
