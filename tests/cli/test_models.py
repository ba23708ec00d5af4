"""prune, verify, diff and rebuild as a user calls them."""

import dataclasses
import json

import pytest
from builders import make_llama
from conftest import make_model, make_trace
from families import make_family_model
from seeing import qwen3_vl, saved
from transformers import AutoModelForCausalLM

from gradpruner.cli.models import layer_numbers, parse_size
from gradpruner.common.errors import ConfigError
from gradpruner.common.progress import set_mode
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.width_plan import LayerWidths

KEEP, DROP = LayerAction("keep"), LayerAction("drop")
MERGING = PruningPlan((KEEP, DROP, KEEP, LayerAction("merge", 2), KEEP, KEEP))


@pytest.fixture
def source(tmp_path):
    model = make_model("gemma2")
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "run" / "plans").mkdir(parents=True)
    MERGING.save(tmp_path / "run" / "plans" / "merged.json")
    make_trace(model, folder=tmp_path / "run" / "trace").save(tmp_path / "run" / "trace")
    return tmp_path / "source"


def test_a_width_plan_is_carried_out_on_a_folder(call, tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path / "source")
    whole = WidthView(model).whole()
    half = LayerWidths((0, 1), tuple(range(8)))
    plan = dataclasses.replace(whole, layers=(half,) * 4)
    plan.save(tmp_path / "plan.json")
    arguments = ("prune", tmp_path / "source", tmp_path / "new", "--plan", tmp_path / "plan.json", "--quiet")

    code, out, err = call(*arguments, "--dry-run", "--json")
    assert code == 0, err
    assert not (tmp_path / "new").exists()
    after = json.loads(out)["savings"]["parameters"]["after"]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "vllm: ok." in out and "relative error" in out
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert count_parameters(pruned) == after and pruned.config.intermediate_size == 8

    code, _, err = call("verify", tmp_path / "new")
    assert code == 2 and "was pruned by a plan of widths" in err
    code, _, err = call(*arguments, "--max-shard-size", "10KB")
    assert code == 2 and "works only with plans of whole layers" in err
    make_llama(num_hidden_layers=3).save_pretrained(tmp_path / "other")
    code, _, err = call("prune", tmp_path / "other", tmp_path / "third", *arguments[3:])
    assert code == 2 and "is for a model with" in err and not (tmp_path / "third").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    code, _, err = call("prune", tmp_path / "source", tmp_path / "mine", *arguments[3:])
    assert code == 2 and (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_the_whole_way_of_a_pruned_model(call, source, tmp_path):
    plan = tmp_path / "run" / "plans" / "merged.json"  # its trace stands beside it and is found
    code, out, err = call("prune", source, tmp_path / "new", "--plan", plan, "--quiet")
    assert code == 0, err
    assert "gemma2: 6 -> 4 layers" in out and "1 of them merged" in out
    assert "llama.cpp: wrong. " in out and "vllm: ok." in out
    assert "relative error" in out and "equal to the bit" in out

    code, out, _ = call("verify", tmp_path / "new", "--json")
    assert code == 0 and json.loads(out)["level"] == "full" and json.loads(out)["passed"]

    set_mode("auto")
    code, out, err = call("diff", source, tmp_path / "new", tmp_path / "delta")
    assert code == 0 and "delta: " in out and "diff [MiB]" in err
    code, out, err = call("rebuild", source, tmp_path / "delta", tmp_path / "again")
    assert code == 0 and "rebuilt" in out and "rebuild [MiB]" in err
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    card = (tmp_path / "new" / "README.md").read_text()
    assert "- llama.cpp: wrong." in card and "- vllm: ok." in card


def test_widths_that_would_not_load_are_refused_before_weights_are_read(call, tmp_path, monkeypatch):
    model = make_family_model("stablelm", vocab_size=32)  # takes the size of a head from hidden and heads
    whole = WidthView(model).whole()
    half = LayerWidths(whole.layers[0].heads[: whole.shape.num_heads // 2], whole.layers[0].channels)
    plan = dataclasses.replace(whole, layers=(half,) * whole.num_layers)
    model.save_pretrained(tmp_path / "source")
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr("gradpruner.pruning.widths_on_disk.load_model", None)
    arguments = ("prune", tmp_path / "source", tmp_path / "new", "--plan", tmp_path / "plan.json")
    for more in ((), ("--dry-run",)):
        code, out, err = call(*arguments, *more)
        assert code == 2 and "would not build these widths" in err and "prune channels only" in err
        assert out == "" and not (tmp_path / "new").exists()


def test_layers_by_hand_and_a_dry_run(call, source, tmp_path):
    code, out, _ = call("prune", source, tmp_path / "new", "--keep", "0-2,5", "--dry-run", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["layers"] == [6, 4] and not (tmp_path / "new").exists()
    assert facts["bytes"][1] < facts["bytes"][0]
    code, out, _ = call("prune", source, tmp_path / "new", "--drop", "3,4", "--json", "--quiet")
    assert code == 0 and json.loads(out)["verified"]["passed"]
    assert (
        json.loads((tmp_path / "new" / "pruning.json").read_text())["plan"]["actions"][3]["action"] == "drop"
    )


def test_a_damaged_model_fails_verification(call, source, tmp_path):
    assert call("prune", source, tmp_path / "new", "--drop", "3", "--quiet")[0] == 0
    path = tmp_path / "new" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40  # one bit of one weight
    path.write_bytes(content)
    code, out, err = call("verify", tmp_path / "new")
    assert code == 6 and "FAILED" in out and "failed verification" in err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--keep", "0-9"], 2, "'0-9' is not a layer or range of layers"),
        (["--keep", "3-1"], 2, "Layers are 0 to 5"),
        (["--keep", "0,0,1"], 2, "listed more than once"),
        (["--keep", "0", "--drop", "1"], 2, "exactly one of --plan"),
        ([], 2, "None of --plan, --keep and --drop"),
        (["--drop", "0-4"], 2, "leaves 1 of 6 layers"),
        (["--drop", "1", "--max-shard-size", "much"], 2, "'much' is not a size"),
        (["--drop", "1", "--verify", "all"], 2, "Unknown level 'all'"),
        (["--drop", "1", "--out", "run"], 2, "belong to a run"),
        (["--plan", "nowhere.json"], 2, "no pruning plan at nowhere.json"),
    ],
)
def test_wrong_requests(call, source, tmp_path, arguments, code, message):
    found, _, err = call("prune", source, tmp_path / "new", "--quiet", *arguments)
    assert found == code and message in err, err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "option", [("--drop", "1"), ("--verify", "all"), ("--max-shard-size", "1KB"), ("--trace", "there")]
)
def test_options_that_a_run_would_ignore(call, source, tmp_path, option):
    code, _, err = call("prune", "--out", tmp_path / "run", *option)
    assert code == 2 and f"{option[0]} needs a model folder and a second folder" in err
    code, _, err = call("prune", source, *option)
    assert code == 2 and f"source NEW {option[0]}" in err.replace("\n", "")


def test_a_folder_is_verified_from_wherever_one_is(call, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("prune", "source", "new", "--drop", "1", "--quiet")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call("verify", "../new")[0] == 0
    source.rename(tmp_path / "moved")
    code, _, err = call("verify", "../new")
    assert code == 2 and "is not found" in err and "--source" in err


def test_wrong_folders(call, source, tmp_path):
    assert call("prune", tmp_path / "none", tmp_path / "new", "--drop", "1")[0] == 4
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("keep")
    for options in ((), ("--dry-run",)):
        code, _, err = call("prune", source, tmp_path / "theirs", "--drop", "1", *options)
        assert code == 2 and "is not empty and was not made by gradpruner" in err
    code, _, err = call("verify", source)
    assert code == 2 and "has no pruning.json" in err
    PruningPlan.from_keep(6, [0, 1, 2]).save(tmp_path / "plan.json")
    code, _, err = call("verify", source, "--plan", tmp_path / "plan.json")
    assert code == 2 and "does not say which model it was made from. Pass --source" in err.replace("\n", " ")
    code, _, err = call("rebuild", source, tmp_path / "run", tmp_path / "new")
    assert code == 6 and "has no delta.json" in err
    code, _, err = call("diff", source, source, tmp_path / "delta")
    assert code != 0 and not (tmp_path / "delta").exists()


def test_families_are_listed(call):
    code, out, _ = call("ls", "families")
    assert code == 0 and "llama" in out and "drop only" in out


def test_sizes_and_layers():
    sizes = {"5GB": 5 * 10**9, "1.5 mb": 1500000, "7": 7, "2k": 2000, "0.5 GiB": 2**29}
    assert {text: parse_size(text) for text in sizes} == sizes
    with pytest.raises(ConfigError):
        parse_size("0")
    assert layer_numbers("0-2, 5", 6) == [0, 1, 2, 5]


def test_cost_of_a_model_that_sees_is_refused_in_one_line_where_only_random_weights_are_left(call, tmp_path):
    folder = saved(qwen3_vl(), tmp_path / "model")
    small = ("--tokens", 4, "--new-tokens", 2, "--device", "cpu")
    code, out, err = call("cost", folder, "--num-prune", 1, *small)
    assert code == 4 and out == "" and "is the decoder of a multimodal model" in err
    assert "gradpruner prune MODEL NEW" in err and "Traceback" not in err
    assert call("cost", folder, "--num-prune", 1, "--dry-run", *small)[0] == 0
