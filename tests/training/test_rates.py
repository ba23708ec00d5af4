"""The learning rate where none is given."""

import json
import math

import pytest
from builders import make_llama, make_project, make_samples
from transformers import AutoConfig

from gradpruner.common.errors import NonFiniteError
from gradpruner.data.encoding import Collator
from gradpruner.evaluation.costing.shapes import shape_folder
from gradpruner.models.sizes import ModelSizes
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.runs.row.rate_search import best_rate
from gradpruner.training.finetuning import finetune
from gradpruner.training.rates import default_rate


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b-v0.3"])
def test_at_8_b_it_is_the_papers(name):
    size = ModelSizes(AutoConfig.from_pretrained(shape_folder(name))).decoder_parameters
    assert default_rate(size, "full") == 1e-5
    assert default_rate(size, "lora") == 1e-4


@pytest.mark.parametrize(
    ("parameters", "mode", "lowest", "highest"),
    [  # rates that were best on held-out rows, see docs/paper.md
        (106_202_880, "full", 1e-4, 4e-4),
        (106_202_880, "lora", 5e-4, 1e-3),
        (6_494_208, "full", 1e-3, 2e-3),
        (6_494_208, "lora", 3e-3, 3e-3),
    ],
)
def test_at_small_sizes_it_is_near_what_was_best_there(parameters, mode, lowest, highest):
    assert lowest <= default_rate(parameters, mode) <= highest


def test_a_run_says_which_rate_it_took_and_a_given_one_stays(call, tmp_path):
    path, values = make_project(tmp_path, variants=["dense"], evaluate={"before_finetuning": False})
    assert run(load_recipe(path), until="finetune")["learning_rate"] == {"value": 1e-3, "source": "as given"}
    del values["finetune"]["learning_rate"]
    path.write_text(json.dumps(values))
    record = run(load_recipe(path), until="finetune")
    taken = default_rate(ModelSizes(make_llama()).decoder_parameters, "full")
    assert record["recipe"]["finetune"]["learning_rate"] == taken == record["learning_rate"]["value"]
    assert "full fine-tuning" in record["learning_rate"]["source"]
    assert max(entry["learning_rate"] for entry in record["variants"]["dense"]["finetune"]["losses"]) == taken
    # The folder keeps what was given: in another mode the rate is another one.
    code, out, _ = call(
        "run", "--out", tmp_path / "run", "--set", "finetune.mode=lora", "--dry-run", "--json"
    )
    facts = json.loads(out)
    assert code == 0 and facts["learning_rate"] != taken and "LoRA" in facts["learning_rate_source"]


def test_in_python_too():
    model = make_llama()
    _, result = finetune(model, make_samples(4), collator=Collator(), device="cpu", max_steps=1, warmup=0)
    assert result.losses[0]["learning_rate"] == default_rate(ModelSizes(model).decoder_parameters, "full")


@pytest.mark.parametrize(("best", "first", "expected"), [(8, [1], 8), (1 / 4, [1], 1 / 4), (2, [1, 2], 2)])
def test_the_search_doubles_and_halves_until_the_best_has_a_worse_one_on_either_side(best, first, expected):
    losses = {rate: loss_of(rate, best) for rate in first}
    assert best_rate(losses, lambda rate: loss_of(rate, best)) == expected
    assert len(losses) <= 6


def loss_of(rate, best):
    return math.inf if rate > 4 * best else abs(math.log(rate / best))


def test_the_search_goes_down_from_rates_at_which_training_diverges_and_gives_up():
    assert best_rate({64: math.inf}, lambda rate: loss_of(rate, 1)) == 1
    with pytest.raises(NonFiniteError, match="at every learning rate from"):
        best_rate({1: math.inf}, lambda rate: math.inf)
