"""What is saved as a finished model was looked at, and its card says names as names."""

import pytest
import torch
from builders import make_llama, make_tokenizer

from gradpruner.common.errors import ModelError, NonFiniteError
from gradpruner.models.folder import describe_model, locate_model
from gradpruner.models.saving import save_model
from gradpruner.plans.layer_plan import LayerAction, PruningPlan

KEEP, DROP = LayerAction("keep"), LayerAction("drop")


def spoil(model, value):
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 0] = value  # a row that no example may ever use
    return model


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("-inf"), torch.bfloat16), (1e5, torch.float16)],
)
def test_a_model_that_holds_nan_is_not_saved(tmp_path, value, dtype):
    save_model(make_llama(), None, tmp_path / "m", dtype=dtype, plan=None, source="x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with pytest.raises(NonFiniteError, match=r"'model\.embed_tokens\.weight' holds NaN or Inf") as caught:
        save_model(spoil(make_llama(), value), None, tmp_path / "m", dtype=dtype, plan=None, source="x")
    assert caught.value.exit_code == 5 and "use another copy" in caught.value.hint
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_values_the_dtype_can_hold_are_saved(tmp_path):
    saved = save_model(
        spoil(make_llama(), 1e5), make_tokenizer(), tmp_path / "m", dtype=torch.float32, plan=None, source="x"
    )
    assert (saved / "pruning.json").is_file()


def test_names_in_a_model_card_are_plain_text(tmp_path):
    name = "x <script>alert(1)</script> [a](javascript:alert(1)) `b` ![c](d)"
    plan = PruningPlan((KEEP, DROP, KEEP), method=name)
    describe_model(tmp_path, plan=plan, source="/models/<b>&\n# heading", kind="model")
    card = (tmp_path / "README.md").read_text()
    assert "<" not in card.replace('base_model: "/models/<b>', "") and "](" not in card.replace("\\](", "")
    assert card.count("\n# ") == 1 and "x &lt;script>" in card and "\\`b\\`" in card


def test_a_path_that_nothing_can_have_is_refused():
    for path, part in (("x" * 300, "too long"), ("a\0b", "NUL"), ("a\udcff", "UTF-8")):
        with pytest.raises(ModelError, match=part):
            locate_model(path)
