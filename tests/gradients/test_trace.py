import json

import pytest
import torch
from safetensors.torch import save_file

from gradpruner.common.errors import IntegrityError, PlanError, ShapeError
from gradpruner.gradients.importance import gram_energies
from gradpruner.gradients.trace import (
    ENERGIES_FILE,
    TRACE_FILE,
    GradientTrace,
    LinearRef,
    TraceInfo,
    factor_file,
    same_model,
    trace_digest,
)
from gradpruner.gradients.trace_writer import TraceWriter

# Two layers, two shapes: linears 0 and 2 are one group, 1 and 3 another.
LINEARS = tuple(
    LinearRef(layer, name, *shape, 2) for layer in (0, 1) for name, shape in (("q", (4, 3)), ("o", (3, 4)))
)


def step_gradients(step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    grad_b = [torch.randn(ref.out_features, 2, generator=generator) * scale for ref in LINEARS]
    grad_a = [torch.randn(2, ref.in_features, generator=generator) * scale * (step > 0) for ref in LINEARS]
    return grad_b, grad_a


def record(folder=None, steps=3, keep_factors=True, **info):
    writer = TraceWriter(LINEARS, folder, keep_factors)
    for step in range(steps):
        assert writer.add_step(*step_gradients(step)) is None
    return writer.finish(TraceInfo(2, LINEARS, model="m", **info))


# --- energies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-20, 1e-30])
@pytest.mark.parametrize("rank", [1, 8])
def test_gram_energies_against_dense_products(scale, rank):
    b, a = torch.randn(5, 40, rank) * scale, torch.randn(5, rank, 30) * scale
    dense = (b.double() @ a.double()).square().sum((1, 2))
    torch.testing.assert_close(gram_energies(b, a), dense, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_energies_of_half_precision(dtype):
    b, a = torch.randn(2, 40, 4).to(dtype), torch.randn(2, 4, 30).to(dtype)
    dense = (b.double() @ a.double()).square().sum((1, 2))
    torch.testing.assert_close(gram_energies(b, a), dense, rtol=1e-12, atol=0)


def test_a_vanishing_product_has_no_negative_energy():
    b = torch.tensor([[[0.1, 0.1]]]) * 3
    a = torch.tensor([[[0.7], [-0.7]]])
    assert float(gram_energies(b, a)) >= 0


def test_energies_of_no_gradient_are_zero():
    assert gram_energies(torch.zeros(2, 4, 1), torch.ones(2, 1, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_entry_shows(bad):
    b, a = torch.ones(2, 4, 1), torch.zeros(2, 1, 3)
    b[1, 2, 0] = bad
    finite = torch.isfinite(gram_energies(b, a))
    assert finite.tolist() == [True, False]


def test_gram_energies_of_mismatched_factors():
    with pytest.raises(ShapeError, match="do not match"):
        gram_energies(torch.zeros(2, 4, 1), torch.zeros(2, 2, 3))


# --- writing and reading ------------------------------------------------------------------------------------


def test_memory_and_disk_hold_the_same(tmp_path):
    memory, disk = record(), record(tmp_path)
    loaded = GradientTrace.load(tmp_path)
    assert torch.equal(memory.energies_SK, loaded.energies_SK)
    assert memory.info == disk.info == loaded.info
    assert trace_digest(memory) == trace_digest(loaded)
    for layer in (0, 1):
        for name in ("q", "o"):
            one, two = memory.factors(layer, name), loaded.factors(layer, name)
            assert torch.equal(one.grad_b_SOR, two.grad_b_SOR)
            assert torch.equal(one.grad_a_SRI, two.grad_a_SRI)


def test_factors_are_what_each_linear_brought():
    trace = record()
    history = trace.factors(1, "q")  # linear 2
    for step in range(3):
        grad_b, grad_a = step_gradients(step)
        assert torch.equal(history.grad_b_SOR[step], grad_b[2])
        assert torch.equal(history.grad_a_SRI[step], grad_a[2])
    assert history.shape == (4, 3)


def test_energies_are_those_of_the_factors():
    trace = record()
    for k, ref in enumerate(LINEARS):
        history = trace.factors(ref.layer, ref.name)
        dense = (history.grad_b_SOR.double() @ history.grad_a_SRI.double()).square().sum((1, 2))
        torch.testing.assert_close(trace.energies_SK[:, k], dense)


def test_steps_counted():
    trace = record()
    assert (trace.num_steps, trace.effective_steps) == (3, 2)  # the first has no A
    assert trace.info.rank == 2
    assert trace.linear_names(0) == ["q", "o"]


def test_layer_energies_sum_over_linears():
    trace = GradientTrace(TraceInfo(2, LINEARS), torch.tensor([[1.0, 4.0, 9.0, 16.0]]))
    assert trace.layer_energies().tolist() == [[5.0, 25.0]]
    assert trace.layer_energies(0.5).tolist() == [[3.0, 7.0]]


def test_save_copies_factors_to_another_folder(tmp_path):
    for source in (record(), record(tmp_path / "first")):
        copy = tmp_path / f"copy of {source.folder is None}"
        source.save(copy)
        loaded = GradientTrace.load(copy)
        loaded.check_factors()
        assert torch.equal(loaded.factors(1, "o").grad_b_SOR, source.factors(1, "o").grad_b_SOR)


def test_size_on_disk(tmp_path):
    assert record().bytes_on_disk() == 0
    needed = 4 * 3 * 4 * 2 * 7
    assert needed < record(tmp_path).bytes_on_disk() < needed + 5000


def test_energies_only(tmp_path):
    trace = record(tmp_path, keep_factors=False)
    assert not trace.has_factors
    assert not (tmp_path / "factors").exists()
    with pytest.raises(PlanError, match="energies only"):
        GradientTrace.load(tmp_path).factors(0, "q")


def test_unknown_linear():
    with pytest.raises(PlanError, match=r"'up' in layer 0.*q, o"):
        record().factors(0, "up")


def test_a_step_with_nan_is_not_recorded(tmp_path):
    writer = TraceWriter(LINEARS, tmp_path)
    grad_b, grad_a = step_gradients(1)
    grad_a[3][0, 0] = float("nan")
    assert writer.add_step(grad_b, grad_a) == 3
    assert writer.num_steps == 0
    assert writer.add_step(*step_gradients(1)) is None
    assert writer.finish(TraceInfo(2, LINEARS)).num_steps == 1


def test_no_step_at_all_is_an_error(tmp_path):
    with pytest.raises(IntegrityError, match="No step"):
        TraceWriter(LINEARS, tmp_path).finish(TraceInfo(2, LINEARS))


def test_a_new_recording_deletes_the_old_one(tmp_path):
    record(tmp_path, steps=5)
    TraceWriter(LINEARS, tmp_path)  # and is interrupted
    with pytest.raises(IntegrityError, match="no gradient trace"):
        GradientTrace.load(tmp_path)
    assert record(tmp_path, steps=2, keep_factors=False).has_factors is False


# --- damage -------------------------------------------------------------------------------------------------


def test_truncated_factor_file(tmp_path):
    record(tmp_path)
    path = factor_file(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-20])
    trace = GradientTrace.load(tmp_path)
    for read in (trace.check_factors, lambda: trace.factors(0, "q")):
        with pytest.raises(IntegrityError, match="step-00002"):
            read()


def test_missing_factor_file(tmp_path):
    record(tmp_path)
    factor_file(tmp_path, 2).unlink()
    with pytest.raises(IntegrityError, match="step-00003"):
        GradientTrace.load(tmp_path).check_factors()


@pytest.mark.parametrize("tensors", [{"x": torch.zeros(1)}, {"grad_b.0": torch.zeros(2, 4, 3)}])
def test_factor_file_of_another_recording(tmp_path, tensors):
    record(tmp_path)
    save_file(tensors, factor_file(tmp_path, 0))
    with pytest.raises(IntegrityError, match=r"'grad_b\.0'"):
        GradientTrace.load(tmp_path).check_factors()


def edit(folder, **changes):
    raw = json.loads((folder / TRACE_FILE).read_text())
    (folder / TRACE_FILE).write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"num_layers": 1},
        {"linears": []},
        {"linears": [{"layer": 0}]},
        {"colour": "red"},
    ],
)
def test_index_that_does_not_fit(tmp_path, changes):
    record(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(IntegrityError, match="able gradient trace"):
        GradientTrace.load(tmp_path)


def test_index_of_an_earlier_release(tmp_path):
    trace = record(tmp_path)
    edit(tmp_path, complete=True, data_sha256="")
    assert GradientTrace.load(tmp_path).info == trace.info


@pytest.mark.parametrize("text", ["[1, 2]", "{}", "null"])
def test_index_that_is_no_index(tmp_path, text):
    record(tmp_path)
    (tmp_path / TRACE_FILE).write_text(text)
    with pytest.raises(IntegrityError, match="able gradient trace"):
        GradientTrace.load(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_energies_that_cannot_be(tmp_path, bad):
    trace = record(tmp_path)
    save_file({"energies": trace.energies_SK.clone().fill_(bad)}, tmp_path / ENERGIES_FILE)
    with pytest.raises(IntegrityError, match="NaN, Inf or negative"):
        GradientTrace.load(tmp_path)


def test_missing_energies(tmp_path):
    record(tmp_path)
    (tmp_path / ENERGIES_FILE).unlink()
    with pytest.raises(IntegrityError, match="able gradient trace"):
        GradientTrace.load(tmp_path)


def test_energies_of_the_wrong_shape():
    with pytest.raises(ShapeError, match="4 linears"):
        GradientTrace(TraceInfo(2, LINEARS), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("llama-2x8-aa", "llama-2x8-aa", True),
        ("llama-2x8-aa", "llama-2x8-bb", False),
        ("llama-2x8-quantised", "llama-2x8-bb", True),
        ("llama-2x8-aa", "llama-2x8-quantised", True),
        ("llama-3x8-quantised", "llama-2x8-bb", False),
    ],
)
def test_same_model(one, other, same):
    assert same_model(one, other) is same
