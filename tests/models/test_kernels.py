"""Faster matrix products: used only where they are exact, and only inside the block."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from gradpruner.models import kernels
from gradpruner.models.kernels import fast_products, with_fast_products


@pytest.fixture
def exact(monkeypatch):
    """Sets whether the kernels of this CPU count as exact, and that there is no GPU."""

    def says(found):
        monkeypatch.setattr(kernels, "_exact", lambda: found)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return says


WIDE, NARROW = (
    SimpleNamespace(config=LlamaConfig(hidden_size=size, num_attention_heads=4)) for size in (192, 64)
)


@with_fast_products
def precision(model):
    return torch.get_float32_matmul_precision()


def inside():
    return precision(WIDE)


def test_the_precision_is_lowered_inside_the_block_only(exact):
    exact(True)
    with pytest.raises(ZeroDivisionError), fast_products(WIDE):
        assert torch.get_float32_matmul_precision() == inside() == "medium"
        raise ZeroDivisionError
    assert inside() == precision(model=WIDE) == "medium"
    assert precision(NARROW) == precision(object()) == precision(None) == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


def test_nothing_changes_where_products_are_rounded_or_with_a_gpu(exact, monkeypatch):
    exact(False)
    assert inside() == "highest"
    exact(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert inside() == "highest"


def test_a_precision_set_by_the_user_stays(exact):
    exact(True)
    torch.set_float32_matmul_precision("high")
    try:
        assert inside() == "high" == torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("rounds", "found"), [(False, True), (True, False)])
def test_rounding_is_noticed(monkeypatch, rounds, found):
    def product(left, right):
        rounded = (left.bfloat16().float(), right.bfloat16().float()) if rounds else (left, right)
        return (rounded[0].double() @ rounded[1].double().T).float()

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    assert kernels._exact.__wrapped__() is found
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_model_computes_the_same_inside_the_block():
    layer, states = torch.nn.Linear(256, 512), torch.randn(64, 256)
    expected = layer(states)
    with fast_products(WIDE):
        torch.testing.assert_close(layer(states), expected, rtol=1e-5, atol=1e-6)
