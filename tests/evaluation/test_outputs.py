"""Outputs are stored line by line, read back after an interruption, and compared in pairs."""

import fcntl
import json

import pytest
import torch
from builders import make_llama, make_tokenizer

from gradpruner.common.errors import ConfigError, IntegrityError
from gradpruner.common.progress import Progress
from gradpruner.common.world import World
from gradpruner.data.examples import Example
from gradpruner.evaluation.outputs import Output, paired_intervals, read_examples, values_of
from gradpruner.evaluation.quality import evaluate

WORDS = ["the red cat", "a dog in the big house", "the dog", "the cat sat", "a red house", "in the house"]
EXAMPLES = [Example(f"e{i}", text, " sat", (" sat", " ran away")) for i, text in enumerate(WORDS)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_llama(vocab_size=len(tokenizer)).eval()


class Stopped(BaseException):
    """Stands in for a kill."""


def test_an_interrupted_evaluation_resumes(model, tokenizer, tmp_path, monkeypatch):
    settings = {"batch_size": 2, "max_length": 64, "max_new_tokens": 3}
    whole = evaluate(model, tokenizer, EXAMPLES, **settings)
    calls, generate, forward = [], model.generate, model.forward

    def dying(*args, **kwargs):
        calls.append("generate")
        if len(calls) == 3:
            raise Stopped
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", dying)
    journal = tmp_path / "new" / "examples.jsonl.part"
    with pytest.raises(Stopped):
        evaluate(model, tokenizer, EXAMPLES, journal=journal, **settings)
    assert len([line for line in journal.read_text().splitlines() if line]) == 4
    with journal.open("a") as file:
        file.write('[5, {"id": "e5", "prompt_ta')  # the kill cut a line short
    calls.clear()
    monkeypatch.setattr(model, "generate", lambda *a, **k: calls.append("generate") or generate(*a, **k))
    again = evaluate(model, tokenizer, EXAMPLES, journal=journal, **settings)
    assert calls == ["generate"]  # one batch of two was missing
    assert again.outputs == whole.outputs
    assert again.metrics == whole.metrics
    calls.clear()
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append("forward") or forward(*a, **k))
    assert evaluate(model, tokenizer, EXAMPLES, journal=journal, **settings).outputs == whole.outputs
    assert calls == []


def test_progress_counts_rows_and_ends_once(model, tokenizer, tmp_path, monkeypatch, capsys):
    settings = {"batch_size": 4, "max_length": 64, "max_new_tokens": 2, "journal": tmp_path / "part"}
    seen = []
    monkeypatch.setattr(Progress, "update", lambda self, done, **_: seen.append((done, self.total)))
    evaluate(model, tokenizer, EXAMPLES, metrics=["exact_match"], **settings)
    assert seen == [(4, 6), (6, 6)]
    seen.clear()
    evaluate(model, tokenizer, EXAMPLES, **settings)  # all answers are known: three batches of options
    assert seen == [(4, 6), (5, 6), (6, 6)]
    seen.clear()
    evaluate(model, tokenizer, EXAMPLES, **(settings | {"journal": None}))
    assert seen == [(2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    capsys.readouterr()
    evaluate(model, tokenizer, EXAMPLES, **settings)
    assert "evaluate 6/6 done" in capsys.readouterr().err


def test_a_journal_of_other_examples_is_ignored(model, tokenizer, tmp_path):
    journal = tmp_path / "part"
    row = {"id": "e0", "prompt_tail": "another prompt", "answer": " sat", "generated": "x", "correct": False}
    journal.write_text(f"[0, {json.dumps(row)}]\n[77, {json.dumps(row)}]\nnull\n[1]\n")
    found = evaluate(model, tokenizer, EXAMPLES, journal=journal, max_length=64, max_new_tokens=2)
    assert found.outputs[0].generated != "x"


def test_outputs_are_read_back_from_their_file(model, tokenizer, tmp_path):
    found = evaluate(model, tokenizer, EXAMPLES, max_length=64, max_new_tokens=2)
    found.write_examples(tmp_path / "examples.jsonl")
    assert read_examples(tmp_path / "examples.jsonl") == found.outputs


def output(number, **values):
    return Output(f"e{number}", "", "", **values)


def test_values_and_order_of_metrics():
    outputs = [
        output(0, correct=True, rouge_l=0.5, bert_score=0.9, number_correct=False),
        output(1, correct=False, rouge_l=0.1, bert_score=0.7, number_correct=True),
    ]
    found = values_of(outputs)
    assert list(found) == ["similarity", "final_number", "exact_match", "bert_score", "rouge_l"]
    assert found["similarity"] == pytest.approx([0.7, 0.4])  # half of each
    assert found["final_number"] == [0.0, 1.0]
    # A metric that one example lacks is left out.
    assert "rouge_l" not in values_of([*outputs, output(2, correct=True)])


def test_paired_intervals_are_sharper_than_two_intervals():
    dense = [output(i, correct=i % 2 == 0) for i in range(200)]
    worse = [output(i, correct=i % 2 == 0 and i % 20 != 0) for i in range(200)]
    found = paired_intervals(dense, worse)["exact_match"]
    assert found["value"] == pytest.approx(-0.05) and found["n"] == 200
    assert found["low"] < found["high"] < 0  # ten answers lost and none won is not chance
    assert paired_intervals(dense, dense)["exact_match"] == {"value": 0, "low": 0, "high": 0, "n": 200}
    assert paired_intervals(dense, worse[1:]) == {}
    assert paired_intervals(dense, worse[::-1]) == {}


def test_end_tokens_can_be_left_out_of_the_likelihood(model, tokenizer):
    with_ends, without = (
        evaluate(
            model, tokenizer, EXAMPLES, metrics=["choice_likelihood"], score_ends=ends, max_length=64
        ).outputs
        for ends in (True, False)
    )
    prompt = tokenizer.encode(EXAMPLES[0].prompt)
    target = tokenizer.encode(" sat", add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
    by_hand = sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(target))
    end = float(logits[-1, tokenizer.eos_token_id])
    assert without[0].choice_scores[0] == pytest.approx(by_hand, abs=1e-4)
    assert with_ends[0].choice_scores[0] == pytest.approx(by_hand + end, abs=1e-4)


def test_case_counts_if_options_differ_in_case_alone(model, tokenizer):
    genotypes = [Example("g", "the red cat", " SAT", (" sat", " SAT"))]
    found = evaluate(model, tokenizer, genotypes, max_length=64).outputs[0]
    assert found.choice_correct == (found.chosen == " SAT")
    assert found.correct == (found.generated.strip() == "SAT")


class Scorer:
    """Stands in for BERTScore."""

    def f1(self, generated, answers):
        assert all(text == text.strip() for text in (*generated, *answers))
        return [0.5] * len(generated)

    def describe(self):
        return {"encoder": "none"}


def test_text_metrics_score_the_greedy_answer(model, tokenizer, monkeypatch):
    monkeypatch.setattr("gradpruner.evaluation.quality.BertScorer", lambda encoder, layer: Scorer())
    found = evaluate(
        model,
        tokenizer,
        EXAMPLES,
        metrics=["rouge_l", "bert_score", "final_number"],
        max_length=64,
        max_new_tokens=3,
    )
    assert list(found.metrics) == ["similarity", "final_number", "bert_score", "rouge_l"]
    half = found.metrics["rouge_l"].value / 2
    assert found.metrics["similarity"].value == pytest.approx(0.25 + half)
    assert found.details["bert_score"] == {"encoder": "none"}
    assert found.details["rouge_l"].startswith("rouge-score 0.")
    assert found.outputs[0].correct is None  # exact_match was not requested


def test_each_process_scores_the_texts_of_its_own_rows(model, tokenizer, monkeypatch):
    class Second(World):
        in_step = staticmethod(lambda work: work())
        in_order = gathered = staticmethod(list)

    monkeypatch.setattr("gradpruner.evaluation.quality.BertScorer", lambda encoder, layer: Scorer())
    monkeypatch.setattr(World, "stop_if_peer_failed", lambda self: None)
    asked = {"metrics": ["bert_score"], "max_length": 64, "max_new_tokens": 3}
    found = evaluate(model, tokenizer, EXAMPLES, world=Second(1, 2), **asked).outputs
    assert [one.id for one in found if one.bert_score == 0.5] == [one.id for one in EXAMPLES[1::2]]


def test_a_journal_has_one_writer_and_must_not_be_a_link(model, tokenizer, tmp_path):
    settings = {"batch_size": 2, "max_length": 64, "max_new_tokens": 3}
    journal = tmp_path / "examples.jsonl.part"
    with journal.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="written by another process"):
            evaluate(model, tokenizer, EXAMPLES, journal=journal, **settings)
    (tmp_path / "thesis.txt").write_text("precious")
    journal.unlink()
    journal.symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(IntegrityError, match="so nothing is written to it"):
        evaluate(model, tokenizer, EXAMPLES, journal=journal, **settings)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
