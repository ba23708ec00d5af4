"""A repair in a checkpoint on disk: the bits of memory, its record, verification, deltas."""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import make_model, make_trace
from families import make_family_model
from repairs import SEED, collate, dropping, make_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gradpruner.common.errors import IntegrityError, PlanError
from gradpruner.models.folder import PRUNING_FILE
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.repair import Repair
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.delta import diff_checkpoint
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.pruning.rebuilding import rebuild_checkpoint
from gradpruner.pruning.repair.refitting import fit_repair
from gradpruner.pruning.verification import verify_checkpoint

KEEP, DROP = LayerAction("keep"), LayerAction("drop")
TWO_CUTS = dropping([1, 4])
# Layer 2 takes in 3 and is refitted as well; layer 0 is only refitted.
MERGING = PruningPlan((KEEP, DROP, KEEP, LayerAction("merge", 2), KEEP, KEEP))


@pytest.fixture(scope="module", autouse=True)
def no_power_cuts():
    """Without waiting for the disk, which takes longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def fit(model, plan, kind="least_squares", **options):
    return fit_repair(model, plan, make_ids(24), collate, kind=kind, seed=SEED, **options)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def facts(folder):
    return json.loads((folder / PRUNING_FILE).read_text())


def found_by(report):
    """Name -> (passed, detail) of every check."""
    return {check.name: (check.passed, check.detail) for check in report.checks}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A Llama that was merged, dropped from and repaired, verified in full as it was made."""
    home = tmp_path_factory.mktemp("repaired")
    model = make_model()
    model.save_pretrained(home / "src")
    trace = make_trace(model)
    repair = fit(model, MERGING, trace=trace)
    repair.save(home / "repair")
    report = prune_checkpoint(
        home / "src", home / "out", MERGING, trace, verify="full", repair=Repair.load(home / "repair")
    )
    return home, trace, repair, report


SMALL = {
    "llama": lambda: (make_model(), TWO_CUTS),
    "gemma2": lambda: (make_model("gemma2"), TWO_CUTS),
    "gpt2": lambda: (make_family_model("gpt2"), dropping([3, 4, 8], 12)),
    "gpt_neox": lambda: (make_family_model("gpt_neox"), dropping([3, 8], 12)),
    "olmo2": lambda: (make_family_model("olmo2"), dropping([3, 8], 12)),
}


@pytest.mark.parametrize(
    ("name", "dtype", "level"),
    [
        *[(name, torch.float32, "full") for name in SMALL],
        *[(name, torch.bfloat16, "structure") for name in SMALL],
        ("llama", torch.float16, "full"),
        ("gemma2", torch.float16, "structure"),
    ],
)
def test_in_memory_and_on_disk_give_the_same_bits(tmp_path, name, dtype, level):
    model, plan = SMALL[name]()
    model.to(dtype).save_pretrained(tmp_path / "src")
    loaded = load(tmp_path / "src")
    assert next(loaded.parameters()).dtype == dtype
    repair = fit(loaded, plan)
    assert repair.weights and len(repair.cuts) == 2
    report = prune_checkpoint(tmp_path / "src", tmp_path / "out", plan, verify=level, repair=repair)
    assert found_by(report)["repaired tensors"][0] is True
    prune_(loaded, plan, repair=repair).save_pretrained(tmp_path / "memory")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "memory"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == dtype for name in one)
    dense = load_file(tmp_path / "src" / "model.safetensors")
    computed = [
        name for name, tensor in one.items() if not any(torch.equal(tensor, t) for t in dense.values())
    ]
    assert len(computed) == len(repair.weights)


def test_a_repair_fitted_in_32_bits_goes_into_a_16_bit_checkpoint(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "src")
    repair = fit(AutoModelForCausalLM.from_pretrained(tmp_path / "src", dtype="float32").eval(), TWO_CUTS)
    prune_checkpoint(tmp_path / "src", tmp_path / "out", TWO_CUTS, verify="structure", repair=repair)
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(found, repair.weights[0].to(torch.bfloat16))


def test_merged_and_repaired_on_disk_and_in_memory(case):
    home, trace, repair, report = case
    assert repair.weights.keys() == {0, 2}
    checks = found_by(report)
    assert checks["repaired tensors"] == (True, "2 tensors have the hashes of the repair")
    assert checks["merged tensors"] == (True, "6 tensors merged again in memory: equal to the bit")
    memory = prune_(make_model(), MERGING, trace, repair=repair).state_dict()
    for name, tensor in load_file(home / "out" / "model.safetensors").items():
        assert torch.equal(tensor, memory[name]), name


def test_the_record_and_the_card_say_what_was_repaired(case):
    home, _, repair, _ = case
    found = facts(home / "out")["repair"]
    assert sorted(found["tensors"]) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert found["kind"] == "least_squares" and found["rows"] == 24 and found["tokens"] == repair.tokens
    assert [cut["error_before"] for cut in found["cuts"]] == [cut.error_before for cut in repair.cuts]
    assert "weights" not in found
    card = (home / "out" / "README.md").read_text()
    assert "Repaired (least squares, 24 rows of the task): the last weights of layers 0, 2" in card


def test_without_a_repair_nothing_is_said_of_one(case, tmp_path):
    home = case[0]
    prune_checkpoint(home / "src", tmp_path / "out", TWO_CUTS, verify="structure")
    assert facts(tmp_path / "out")["repair"] is None
    assert "Repaired" not in (tmp_path / "out" / "README.md").read_text()
    assert "repaired tensors" not in found_by(verify_checkpoint(tmp_path / "out", level="structure"))


@pytest.mark.parametrize("with_repair", [True, False])
def test_verified_again_with_and_without_the_repair(case, with_repair):
    home, trace, repair, _ = case
    given = {"repair": repair, "trace": trace} if with_repair else {}
    report = verify_checkpoint(home / "out", level="full", **given)
    assert report.passed
    checks = found_by(report)
    assert checks["repaired tensors"][0] is True and checks["logits"][0] is True
    assert "1 with merged weights, 2 repaired" in checks["source"][1]


def tampered(source, folder, change):
    """A copy of a checkpoint with one entry of one tensor changed."""
    folder.mkdir()
    for name, raw in content(source).items():
        (folder / name).write_bytes(raw)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("level", ["structure", "full"])
@pytest.mark.parametrize("with_repair", [True, False])
def test_one_changed_entry_of_a_repaired_tensor_is_found(case, tmp_path, with_repair, level):
    home, trace, repair, _ = case

    def change(tensors):
        weight = tensors["model.layers.1.mlp.down_proj.weight"]
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))

    folder = tampered(home / "out", tmp_path / "bad", change)
    given = {"repair": repair, "trace": trace} if with_repair else {}
    report = verify_checkpoint(folder, level=level, **given)
    assert not report.passed
    assert found_by(report)["repaired tensors"] == (
        False,
        "'model.layers.1.mlp.down_proj.weight' does not have the hash of the repair",
    )


def test_another_repair_of_the_same_plan_is_found(case):
    home, trace, repair, _ = case
    other = replace(repair, weights={i: w * 1.001 for i, w in repair.weights.items()})
    report = verify_checkpoint(home / "out", level="structure", trace=trace, repair=other)
    assert found_by(report)["repaired tensors"][0] is False


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r["cuts"][0].update(linear="mlp.left_proj"), "no 'mlp.left_proj' in layer 0"),
        (lambda r: r["cuts"][0].update(layer=1), "no 'mlp.down_proj' in layer 1"),
        (lambda r: r["cuts"][0].update(layer=99), "no 'mlp.down_proj' in layer 99"),
        (lambda r: r["cuts"].pop(), "records the tensors"),
    ],
)
def test_a_record_that_does_not_fit_is_a_failed_check(case, tmp_path, change, match):
    home = case[0]
    folder = tampered(home / "out", tmp_path / "bad", lambda tensors: None)
    record = facts(folder)
    change(record["repair"])
    (folder / PRUNING_FILE).write_text(json.dumps(record))
    passed, detail = found_by(verify_checkpoint(folder, level="structure"))["repaired tensors"]
    assert passed is False and match in detail


@pytest.mark.parametrize("raw", [3, {"cuts": []}, {"cuts": [{}], "tensors": {}}, {"cuts": 1, "tensors": {}}])
def test_an_unreadable_record_is_refused(case, tmp_path, raw):
    folder = tampered(case[0] / "out", tmp_path / "bad", lambda tensors: None)
    (folder / PRUNING_FILE).write_text(json.dumps(facts(folder) | {"repair": raw}))
    with pytest.raises(IntegrityError, match="what was repaired"):
        verify_checkpoint(folder, level="structure")


def test_a_tuned_model_is_not_held_to_the_hashes(case, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] += 0.1

    folder = tampered(case[0] / "out", tmp_path / "tuned", change)
    (folder / PRUNING_FILE).write_text(json.dumps(facts(folder) | {"finetune": {}}))
    report = verify_checkpoint(folder, level="structure")
    assert report.passed and found_by(report)["repaired tensors"][0] is None


def test_diff_and_rebuild_give_the_same_files(case, tmp_path):
    home = case[0]
    diff_checkpoint(home / "src", home / "out", tmp_path / "delta")
    rebuild_checkpoint(home / "src", tmp_path / "delta", tmp_path / "rebuilt")
    assert content(tmp_path / "rebuilt") == content(home / "out")
    size = sum(len(raw) for raw in content(tmp_path / "delta").values())
    assert size < sum(len(raw) for raw in content(home / "out").values())
    assert verify_checkpoint(tmp_path / "rebuilt", level="full").passed


def test_a_repair_that_does_not_fit_writes_nothing(case, tmp_path):
    home, trace, repair, _ = case
    make_model(seed=1).save_pretrained(tmp_path / "other")
    misshapen = replace(repair, model="", weights={i: torch.zeros(32, 47) for i in repair.weights})
    unknown = replace(
        repair, model="", cuts=tuple(replace(cut, linear="mlp.left_proj") for cut in repair.cuts)
    )
    source = home / "src"
    for where, plan, given, match in (
        (source, TWO_CUTS, repair, "fitted for a model without"),
        (tmp_path / "other", MERGING, repair, "fitted on model"),
        (source, MERGING, misshapen, r"\(32, 47\).*\(32, 48\)"),
        (source, MERGING, unknown, "is missing"),
    ):
        checked = make_trace(make_model(seed=1)) if where != source else trace
        with pytest.raises(PlanError, match=match):
            prune_checkpoint(where, tmp_path / "out", plan, checked, repair=given)
        assert not (tmp_path / "out").exists()


def test_a_quantised_checkpoint_is_refused(case, tmp_path):
    home, _, repair, _ = case
    folder = tampered(home / "src", tmp_path / "src", lambda tensors: None)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="quantised"):
        Blueprint(folder, dropping([1, 3]), repair=repair)


def test_a_repair_without_a_refitted_weight_changes_nothing(case, tmp_path):
    home = case[0]
    repair = fit(make_model(), TWO_CUTS)
    idle = replace(repair, cuts=tuple(replace(cut, ridge=None) for cut in repair.cuts), weights={})
    prune_checkpoint(home / "src", tmp_path / "out", TWO_CUTS, verify="full", repair=idle)
    prune_checkpoint(home / "src", tmp_path / "plain", TWO_CUTS, verify="structure")
    one, other = (content(tmp_path / name)["model.safetensors"] for name in ("out", "plain"))
    assert one == other
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Repaired" not in card
    assert verify_checkpoint(tmp_path / "out", level="structure").passed
