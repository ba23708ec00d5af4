import copy
import errno
import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_trace
from families import make_family_model, make_seeing_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gradpruner.common.errors import (
    ConfigError,
    GradPrunerError,
    IntegrityError,
    ModelError,
    PlanError,
    ResourceError,
)
from gradpruner.common.files import held
from gradpruner.models import folder as folder_module
from gradpruner.models.folder import PRUNING_FILE, check_output, staged_folder
from gradpruner.models.layers import fingerprint
from gradpruner.models.shards import INDEX_FILE, open_shards
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.merging import Source, merge_linear
from gradpruner.pruning import on_disk as streaming
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.in_memory import check_same_linears, prune_
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.pruning.verification import VerifyReport, verify_checkpoint

KEEP, DROP = LayerAction("keep"), LayerAction("drop")
DROPPING = PruningPlan((KEEP, DROP, KEEP, KEEP, DROP, KEEP))
MERGING = PruningPlan((KEEP, DROP, KEEP, LayerAction("merge", 2), LayerAction("merge", 2), KEEP))
# Layer 3 takes in 4, layer 2 then 3, and layer 0 what has become of 2, and layer 1.
CHAIN = PruningPlan((KEEP, *(LayerAction("merge", i) for i in (0, 0, 2, 3)), KEEP), rule="laco")


def tree(folder):
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder):
    """Name -> dtype, shape and bytes."""
    found = {}
    for ref in open_shards(folder).tensors.values():
        with ref.file.open("rb") as file:
            file.seek(ref.start)
            found[ref.name] = (ref.dtype, ref.shape, file.read(ref.num_bytes))
    return found


def raw_config(folder, **changes):
    """The content of config.json, after changing it; None removes a field."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    if changes:
        path.write_text(json.dumps(raw))
    return raw


def recast(folder, change):
    """Rewrites model.safetensors with `change(name, tensor)`; None leaves a tensor out."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: new for name, old in tensors.items() if (new := change(name, old)) is not None}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def llama():
    return make_model()


@pytest.fixture(scope="module")
def llama_trace(llama):
    return make_trace(llama)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "src"
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def src(saved, tmp_path):
    """A folder of a six-layer Llama to change at will."""
    return shutil.copytree(saved, tmp_path / "src")


@pytest.fixture
def unverified(monkeypatch):
    """For tests of what comes before and after verification."""

    def accept(staged, *args, **options):
        return VerifyReport(str(staged), "structure", ())

    monkeypatch.setattr(streaming, "verify_written", accept)


# -- a folder with everything in it ----------------------------------------------------------------------

CARRIED = {
    "tokenizer.json": b'{"model": {"vocab": {"\xc3\xa4": 0}}}\r\n',
    "tokenizer_config.json": b'{"chat_template": "{{ x }}",\n\n "pad_token": "<p>"}',
    "tokenizer.model": bytes(range(256)),
    "special_tokens_map.json": b"{}",
    "generation_config.json": b'{"temperature":0.6,   "do_sample": true, "eos_token_id": [2, 3]}',
    "chat_template.jinja": b"{% for m in messages %}\r\n{{ m }}{% endfor %}",
    "merges.txt": b"#version: 0.2\n",
    "LICENSE": b"Apache\r\n",
    "LICENSE.md": b"# Apache",
    "Notice.txt": b"\xff\xfe not UTF-8",
    "USE_POLICY.md": b"be nice",
    "additional_chat_templates/tool use.jinja": b"{{ tools }}\r\n",
}
LEFT_BEHIND = {
    "README.md": b"# The original",
    "modeling_tiny.py": b"raise SystemExit",
    "license.py": b"raise SystemExit",
    "consolidated.safetensors": b"not even safetensors",
    "consolidated.00.pth": b"",
    "params.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"pickle",
    "adapter_model.safetensors": b"",
    "model.gguf": b"",
    "model.onnx": b"",
    ".gitattributes": b"",
    ".secret.json": b"{}",
    "original/params.json": b"{}",
    "additional_chat_templates/.hidden.jinja": b"",
    "additional_chat_templates/code.py": b"",
}
ODD_FIELDS = {
    "my_key": {"nested": [1, None, "ä"]},
    "torch_dtype": "bfloat16",
    "dtype": None,
    "auto_map": {"AutoModelForCausalLM": "modeling_tiny.Tiny"},
    "time_step_limit": [0.0, float("inf")],  # some mamba configs have this, which strict JSON has not
}


def write_all(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def rich(llama, llama_trace, tmp_path_factory):
    """Source, result and report of a run with everything odd: paths, shards, files, fields."""
    home = tmp_path_factory.mktemp("mödel dir 空")
    source, target = home / "the sörce", home / "new" / "das Ergebnis ✂"
    copy.deepcopy(llama).bfloat16().save_pretrained(source, max_shard_size="40KB")
    write_all(source, CARRIED | LEFT_BEHIND)
    raw_config(source, **ODD_FIELDS)
    before, steps, here = tree(source), [], Path.cwd()
    os.chdir(home)
    try:
        report = prune_checkpoint(
            "the sörce",
            "new/das Ergebnis ✂",
            MERGING,
            make_trace(AutoModelForCausalLM.from_pretrained(source)),
            max_shard_bytes=20_000,
            verify="structure",
            progress=steps.append,
        )
    finally:
        os.chdir(here)
    assert tree(source) == before
    assert os.listdir(target.parent) == [target.name]
    assert sum(steps) == sum(len(data) for _, _, data in tensors_of(target).values())
    return source, target, report


def test_the_result_loads_with_plain_transformers(rich):
    _, target, report = rich
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == 3 and model.dtype == torch.bfloat16
    assert report.passed and report.level == "structure" and report.folder == "new/das Ergebnis ✂"
    assert report.checks[0].detail.startswith("30 tensors, ")


def test_files_beside_the_weights_are_carried_byte_for_byte_or_not_at_all(rich):
    _, target, _ = rich
    found = tree(target)
    weights = {ref.file.name for ref in open_shards(target).tensors.values()}
    assert {name: found[name] for name in CARRIED} == CARRIED
    assert found.keys() - CARRIED.keys() == {*weights, INDEX_FILE, "config.json", "README.md", PRUNING_FILE}


def test_kept_tensors_keep_their_bytes_under_their_new_names(rich):
    source, target, _ = rich
    old, new = tensors_of(source), tensors_of(target)
    for name, value in new.items():
        before = name.replace("layers.1.", "layers.2.") if "layers.1." in name else name
        before = name.replace("layers.2.", "layers.5.") if "layers.2." in name else before
        merged = "layers.1." in name and "proj" in name
        assert (value == old[before]) != merged and value[:2] == old[before][:2]
    sizes = [header.file_bytes - header.data_start for header in open_shards(target).headers]
    assert len(sizes) > 2 and max(sizes) <= 20_000


def test_the_config_keeps_its_fields_and_their_spelling(rich):
    source, target, _ = rich
    old, new = raw_config(source), raw_config(target)
    theta = {"rope_theta": 10000.0}  # beside the flat rope_parameters, for readers that do not know these
    changed = {"num_hidden_layers": 3} | theta
    assert new == {key: value for key, value in old.items() if key != "auto_map"} | changed
    assert list(new)[: len(old) - 1] == [key for key in old if key != "auto_map"]
    assert (
        AutoConfig.from_pretrained(target).rope_parameters
        == AutoConfig.from_pretrained(source).rope_parameters
    )


def test_the_record_says_what_was_done(rich):
    source, target, report = rich
    facts = json.loads((target / PRUNING_FILE).read_text())
    assert PruningPlan.from_dict(facts["plan"]) == MERGING
    assert (facts["source"], facts["kind"], facts["previous"]) == (str(source), "model", None)
    assert (facts["layers"], facts["tensors"], facts["merged_tensors"]) == ([6, 3], [57, 30], 7)
    assert facts["verified"] == report.to_dict() and facts["fingerprint"].startswith("llama-6x32-")
    hashes = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in target.glob("*.safetensors")
    }
    assert facts["files"] == hashes and len(hashes) > 2
    assert facts["bytes"][1] == sum(ref.num_bytes for ref in open_shards(target).tensors.values())


def test_the_model_card(rich):
    card = (rich[1] / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    # A folder is no id of the hub, and this one's own card says neither base nor licence.
    assert "base_model" not in yaml.safe_load(front) and yaml.safe_load(front)["license"] == "unknown"
    assert "Made from the sörce, whose name on the hub is not known." in body
    assert "3 of 6 decoder layers were removed: 1, 3-4." in body
    assert "Layers 3-4 were merged into layer 2 (rule sum, density 0.2)." in body


# -- the same bits as in memory --------------------------------------------------------------------------


def decoder_config(folder):
    """As transformers reads it; without the dtype, which not every source states for its decoder alone."""
    left_out = ("dtype", "rope_theta", "rope_scaling", "_name_or_path")
    values = AutoConfig.from_pretrained(folder).get_text_config().to_dict()
    return {key: value for key, value in values.items() if key not in left_out}


def family(model_type, **options):
    return lambda: make_family_model(model_type, **options)


IDENTICAL = {
    "llama, bfloat16, many to one": (make_model, torch.bfloat16, MERGING, "40KB", 10**9),
    "gpt2, transposed": (
        family("gpt2", num_hidden_layers=6),
        torch.float32,
        replace(MERGING, rule="norm_preserving"),
        "1GB",
        40_000,
    ),
    "llama, chain": (make_model, torch.bfloat16, CHAIN, "40KB", 10**9),
    "llama, chain as released": (
        make_model,
        torch.float16,
        replace(CHAIN, rule="laco_released"),
        "1GB",
        10**9,
    ),
    "gpt2, chain": (family("gpt2", num_hidden_layers=6), torch.float32, CHAIN, "1GB", 10**9),
    "llama, float16": (make_model, torch.float16, replace(MERGING, rule="fisher", density=0.4), "1GB", 10**9),
    "gemma3, nested": (
        lambda: make_seeing_model("gemma3"),
        torch.bfloat16,
        PruningPlan.from_keep(12, (0, 1, 3, 6, 7, 9, 10)),
        "1GB",
        10**9,
    ),
    "gemma3n, wide tensors": (
        family("gemma3n_text"),
        torch.bfloat16,
        PruningPlan.from_keep(12, (0, 1, 3, 6, 7, 9, 10)),
        "50KB",
        60_000,
    ),
}


@pytest.mark.parametrize("case", IDENTICAL)
def test_on_disk_and_in_memory_give_the_same_bits(tmp_path, case):
    make, dtype, plan, source_shards, max_shard_bytes = IDENTICAL[case]
    make().to(dtype).save_pretrained(tmp_path / "src", max_shard_size=source_shards)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src", dtype=dtype)
    trace = make_trace(model) if plan.needs_trace else None
    options = {"max_shard_bytes": max_shard_bytes, "verify": "structure"}
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, trace, **options)
    assert (len(open_shards(tmp_path / "dst").headers) > 1) == (max_shard_bytes < 10**9)
    prune_(model, plan, trace).save_pretrained(tmp_path / "memory")
    assert tensors_of(tmp_path / "dst") == tensors_of(tmp_path / "memory")
    assert decoder_config(tmp_path / "dst") == decoder_config(tmp_path / "memory")


def test_verified_in_full_and_pruned_again(src, tmp_path, llama_trace):
    report = prune_checkpoint(src, tmp_path / "once", MERGING, llama_trace, verify="full")
    assert report.passed and report.level == "full"
    assert {"logits", "cached logits", "generation"} <= {check.name for check in report.checks}
    prune_checkpoint(
        tmp_path / "once", tmp_path / "twice", PruningPlan.from_keep(3, (0, 2)), verify="structure"
    )
    facts = json.loads((tmp_path / "twice" / PRUNING_FILE).read_text())
    assert facts["previous"] == json.loads((tmp_path / "once" / PRUNING_FILE).read_text())
    assert facts["layers"] == [3, 2]
    prune_checkpoint(src, tmp_path / "direct", PruningPlan.from_keep(6, (0, 5)), verify="structure")
    assert tensors_of(tmp_path / "twice") == tensors_of(tmp_path / "direct")
    assert raw_config(tmp_path / "twice") == raw_config(tmp_path / "direct")


def test_a_chain_is_verified_in_full_without_a_trace(src, tmp_path):
    report = prune_checkpoint(src, tmp_path / "dst", CHAIN, verify="full")
    details = {check.name: check.detail for check in report.checks}
    assert report.passed and details["merged tensors"] == "7 tensors merged again in memory: equal to the bit"
    assert details["source"] == "4 layers passed through, 1 with merged weights"
    assert verify_checkpoint(tmp_path / "dst", level="full").passed
    recast(tmp_path / "dst", lambda name, t: t + 1 if name == "model.layers.0.mlp.up_proj.weight" else t)
    failed = verify_checkpoint(tmp_path / "dst", level="full")
    assert not failed.passed and failed.checks[-1].name == "merged tensors"
    record = tmp_path / "dst" / PRUNING_FILE
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finetune": {"steps": 1}}))
    assert verify_checkpoint(tmp_path / "dst", level="full").passed  # other weights are no fault of training


def test_layers_of_different_shapes_are_not_merged_without_a_trace_either(src, tmp_path):
    recast(src, lambda name, tensor: tensor)
    blueprint = Blueprint(src, replace(CHAIN, rule="laco_released"))
    shapes = {
        layer: {name: r.shape for name, r in found.items()} for layer, found in blueprint.linears.items()
    }
    shapes[3] = {}
    with pytest.raises(PlanError, match="Layers 3 and 2 do not have the same linears"):
        check_same_linears(CHAIN, shapes)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_are_copied_and_merged_as_they_are_stored(src, tmp_path, dtype):
    recast(src, lambda name, tensor: tensor.to(dtype) if "proj" in name else tensor)
    old = load_file(src / "model.safetensors")
    prune_checkpoint(src, tmp_path / "dropped", DROPPING, verify="structure")
    assert (
        tensors_of(tmp_path / "dropped")["model.layers.3.mlp.up_proj.weight"]
        == (tensors_of(src)["model.layers.5.mlp.up_proj.weight"])
    )
    trace = make_trace(AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32))
    prune_checkpoint(src, tmp_path / "merged", MERGING, trace, verify="structure")
    name = "model.layers.{}.mlp.up_proj.weight".format
    sources = [Source(old[name(i)], trace.factors(i, "mlp.up_proj")) for i in (3, 4)]
    found = load_file(tmp_path / "merged" / "model.safetensors")[name(1)]
    assert found.dtype == dtype
    assert torch.equal(found.float(), merge_linear(old[name(2)], sources).float())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 8.0,
                             "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ],
)  # fmt: skip
def test_rotary_parameters_are_read_as_before(src, tmp_path, unverified, rope):
    old = raw_config(src, **rope)
    prune_checkpoint(src, tmp_path / "dst", DROPPING)
    new = raw_config(tmp_path / "dst")
    configs = [AutoConfig.from_pretrained(folder) for folder in (src, tmp_path / "dst")]
    assert configs[0].rope_parameters == configs[1].rope_parameters
    assert new["rope_theta"] == 5e5 and {k: new[k] for k in old} == old | {"num_hidden_layers": 4}
    assert new["rope_scaling"]["rope_type"] in ("linear", "yarn", "llama3")


# -- quantised checkpoints -------------------------------------------------------------------------------


@pytest.fixture
def quantised(src):
    """What GPTQ leaves: packed integers, and layer 3 with an MLP as it was."""

    def quantise(folder):
        tensors = load_file(folder / "model.safetensors")
        for name in [n for n in tensors if "proj" in n and "layers.3.mlp" not in n]:
            path, weight = name.removesuffix(".weight"), tensors.pop(name)
            tensors[f"{path}.qweight"] = torch.randint(2**31, (weight.shape[1] // 8, weight.shape[0])).int()
            tensors[f"{path}.scales"] = torch.rand(2, weight.shape[0]).half()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    quantise(src)
    section = {
        "quant_method": "gptq",
        "bits": 4,
        "modules_not_to_convert": ["model.layers.3.mlp", "model.layers.4.self_attn", "lm_head"],
    }
    raw_config(src, quantization_config=section)
    return src


def test_a_quantised_checkpoint_can_be_dropped_from(quantised, tmp_path):
    report = prune_checkpoint(quantised, tmp_path / "dst", DROPPING, verify="full")
    assert report.level == "structure"  # there is no hardware to run it on
    section = raw_config(tmp_path / "dst")["quantization_config"]
    assert section["modules_not_to_convert"] == ["model.layers.2.mlp", "lm_head"]
    old, new = tensors_of(quantised), tensors_of(tmp_path / "dst")
    for kept, layer in enumerate(DROPPING.keep):
        for name, value in old.items():
            if name.startswith(f"model.layers.{layer}."):
                assert new[name.replace(f"layers.{layer}.", f"layers.{kept}.")] == value
    assert len(new) == sum(1 for n in old if "layers.1." not in n and "layers.4." not in n)


def test_a_quantised_checkpoint_cannot_be_merged(quantised, tmp_path, llama_trace):
    with pytest.raises(PlanError, match="is quantised; its layers can be dropped but not merged"):
        prune_checkpoint(quantised, tmp_path / "dst", MERGING, llama_trace)
    assert os.listdir(tmp_path) == ["src"]


def test_a_quantised_layer_without_one_of_its_modules_is_refused(quantised, tmp_path):
    recast(quantised, lambda name, tensor: None if "layers.2.mlp.up_proj" in name else tensor)
    with pytest.raises(
        IntegrityError, match=r"layers 0 and 2 do not have the same modules \('.mlp.up_proj'\)"
    ):
        prune_checkpoint(quantised, tmp_path / "dst", DROPPING)


# -- refused, and nothing written ------------------------------------------------------------------------


def spoil(value, layer):
    def change(name, tensor):
        if f"layers.{layer}.mlp.down_proj" in name:
            tensor[-1, -1] = value
        return tensor

    return lambda folder: recast(folder, change)


def without(part):
    return lambda folder: recast(folder, lambda name, tensor: None if part in name else tensor)


def with_extra(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.extra.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"}
    )


def misshapen(folder):
    recast(folder, lambda name, tensor: tensor[:-1].clone() if "layers.2.mlp.up" in name else tensor)


def deeper(depth):
    return lambda folder: raw_config(folder, num_hidden_layers=depth)


def link_outside(folder):
    (folder.parent / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(folder.parent / "secret")


def dangling(folder):
    (folder / "a.json").symlink_to("none")


def with_adapters(folder):
    (folder / "adapter_config.json").write_text("{}")


def bad_record(text):
    return lambda folder: (folder / PRUNING_FILE).write_text(text)


NAN, INF = float("nan"), float("inf")
MADE_FOR = replace(DROPPING, evidence={"model": "llama-6x32-0123456789ab"})
BAD_SOURCES = {
    "plan of another depth": (None, PruningPlan.from_keep(5, (0, 1)), PlanError, "5 layers; this one has 6"),
    "plan of another model": (None, MADE_FOR, PlanError, "was made from model llama-6x32-0123456789ab"),
    "merging without a trace": (None, MERGING, PlanError, "needs the recorded gradients"),
    "missing tensor": (without("layers.2.mlp.up"), DROPPING, IntegrityError, r"1 missing keys.*layers\.2"),
    "missing layer": (without("layers.5."), DROPPING, IntegrityError, "no tensors for 6 layers|missing keys"),
    "extra tensor": (with_extra, DROPPING, IntegrityError, r"1 unexpected keys.*model\.extra"),
    "wrong shape": (misshapen, DROPPING, IntegrityError, r"mismatched keys.*layers\.2\.mlp\.up"),
    "deeper config": (deeper(8), PruningPlan.from_keep(8, (0, 1)), IntegrityError, r"missing keys|8 layers"),
    "shallower config": (deeper(4), PruningPlan.from_keep(4, (0, 1)), IntegrityError, "unexpected keys|4 la"),
    "NaN in a kept layer": (spoil(NAN, 5), DROPPING, IntegrityError, r"'model\.layers\.5\.mlp.*NaN"),
    "Inf in a kept layer": (spoil(-INF, 0), DROPPING, IntegrityError, r"'model\.layers\.0\.mlp.*NaN"),
    "link to elsewhere": (link_outside, DROPPING, IntegrityError, "tokenizer.json leads to .*, which is out"),
    "dangling link": (dangling, DROPPING, IntegrityError, "a.json is missing"),
    "adapters": (with_adapters, DROPPING, ModelError, "holds adapters beside its weights"),
    "damaged record": (bad_record("{"), DROPPING, IntegrityError, "not a readable pruning record"),
    "deep config": (
        lambda f: (f / "config.json").write_text('{"a":' + "[" * 100_000),
        DROPPING,
        ModelError,
        "config.json is not valid JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_or_plan_leaves_nothing(src, tmp_path, case):
    change, plan, error, message = BAD_SOURCES[case]
    if change:
        change(src)
    before = tree(tmp_path)
    with pytest.raises(error, match=message):
        prune_checkpoint(src, tmp_path / "dst", plan, verify="structure")
    assert tree(tmp_path) == before and set(os.listdir(tmp_path)) <= {"src", "secret"}


def test_a_trace_of_another_model_is_refused(src, tmp_path):
    with pytest.raises(PlanError, match="was recorded on model"):
        prune_checkpoint(src, tmp_path / "dst", MERGING, make_trace(make_model(seed=1)))
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("layer", [2, 3])
def test_nan_in_what_is_merged_is_refused_by_its_own_name(src, tmp_path, llama, unverified, layer):
    spoil(NAN, layer)(src)
    trace = make_trace(llama)
    trace.info = replace(trace.info, model="")  # the NaN is not in what the fingerprint looks at, or is
    with pytest.raises(IntegrityError, match=rf"'model\.layers\.{layer}\.mlp\.down_proj.weight' in .*NaN"):
        prune_checkpoint(src, tmp_path / "dst", MERGING, trace)
    assert os.listdir(tmp_path) == ["src"]


def test_nan_in_a_dropped_layer_goes_with_it(src, tmp_path, unverified):
    spoil(NAN, 4)(src)
    prune_checkpoint(src, tmp_path / "dst", DROPPING)
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "dst" / "model.safetensors").values())


def test_destinations_that_are_refused(src, tmp_path):
    (tmp_path / "file").write_text("")
    write_all(tmp_path, {"foreign/x": b"", "ours/pruning.json": b"{}", "ours/src/x": b""})
    (tmp_path / "link").symlink_to(src)
    shutil.copytree(src, tmp_path / "ours" / "model")
    before = tree(tmp_path)
    for source, target, message in (
        (src, src, "is the input"),
        (src, tmp_path / "link", "is the input"),
        (src, src / "sub" / "dst", "lies inside it"),
        (src, tmp_path / "file", "is a file"),
        (src, tmp_path / "foreign", "not empty and was not made by gradpruner"),
        (
            tmp_path / "ours" / "model",
            tmp_path / "ours",
            "lies inside the output .*, which would be replaced",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            prune_checkpoint(source, target, DROPPING)
    for options in ({"max_shard_bytes": 0}, {"verify": "fully"}):
        with pytest.raises(ConfigError, match=r"at least 1 is needed|Unknown level 'fully'"):
            prune_checkpoint(src, tmp_path / "dst", DROPPING, **options)
    assert tree(tmp_path) == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(src, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr(streaming, "staged_folder", None)
    with pytest.raises(ResourceError, match=r"checkpoint needs 1[0-9.]+ MiB in .*; 977 KiB are free"):
        prune_checkpoint(src, tmp_path / "dst", DROPPING)


def test_a_result_that_fails_verification_never_appears(src, tmp_path, monkeypatch):
    right = Blueprint.new_config
    monkeypatch.setattr(Blueprint, "new_config", lambda self: right(self) | {"num_hidden_layers": 3})
    with pytest.raises(
        IntegrityError, match=r"dst failed verification: config: 3 layers in config.json, 4 in"
    ):
        prune_checkpoint(src, tmp_path / "dst", DROPPING, verify="structure")
    assert os.listdir(tmp_path) == ["src"]


# -- failing and dying at every moment -------------------------------------------------------------------


@pytest.fixture
def quick(saved, tmp_path, llama_trace, unverified, monkeypatch):
    """Pruning without what only reads: a run takes milliseconds. Several shards, carried files, a merge."""
    source = shutil.copytree(saved, tmp_path / "in" / "src")
    write_all(source, {"tokenizer.json": b"{}", "LICENSE": b"x", "additional_chat_templates/a.jinja": b"y"})
    blueprint = Blueprint(source, MERGING, llama_trace)
    blueprint._merge = functools.cache(blueprint._merge)
    monkeypatch.setattr(streaming, "Blueprint", lambda *args, **options: blueprint)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of use in a power cut only, and slow

    def run(target):
        prune_checkpoint(source, target, MERGING, llama_trace, max_shard_bytes=60_000)

    run(tmp_path / "in" / "reference")
    report = verify_checkpoint(tmp_path / "in" / "reference", source, MERGING, llama_trace, level="structure")
    report.raise_on_failure()
    run.reference = tree(tmp_path / "in" / "reference")
    assert len(run.reference) == 10
    return run


WRITES = ("write", "copy_file_range", "sendfile", "fsync", "replace", "mkdir", "chmod")
REMOVALS = ("unlink", "rmdir")


def instrument(monkeypatch, reached, names):
    """Calls `reached` before every system call that changes the disk, and in the middle of every text."""

    def wrap(name, function):
        def wrapped(*args, **options):
            reached(name)
            return function(*args, **options)

        return wrapped

    def write_text(self, text, encoding=None):
        reached("write_text")
        with open(self, "w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
            file.flush()
            reached("write_text")
            file.write(text[len(text) // 2 :])

    for name in names:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr(Path, "write_text", write_text)


def count_points(monkeypatch, names, work):
    points = []
    with monkeypatch.context() as patch:
        instrument(patch, points.append, names)
        work()
    return len(points)


def started(work):
    """Runs `work` in a child; returns its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except GradPrunerError as error:
            status = 10 + error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def status_of(child):
    """The exit status of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work):
    return status_of(started(work))


def die_at(monkeypatch, number):
    """In a child: SIGKILL before the point of that number, counted from 0."""
    left = iter(range(number, -1, -1))

    def reached(name):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    instrument(monkeypatch, reached, WRITES + REMOVALS)


def test_killed_at_every_point_a_new_run_completes_and_leaves_no_trace(quick, tmp_path, monkeypatch):
    target = tmp_path / "out" / "dst"
    points = count_points(monkeypatch, WRITES + REMOVALS, lambda: quick(target))
    assert points > 50
    seen = set()
    for number in range(points + 1):
        shutil.rmtree(target.parent)

        def work(number=number):
            die_at(monkeypatch, number)
            quick(target)

        status = forked(work)
        assert status == (0 if number == points else -signal.SIGKILL)
        assert not target.exists() or tree(target) == quick.reference
        seen.add(target.exists())
        if number % 4 == 0 or target.exists() or number > points - 5:
            quick(target)
            assert os.listdir(target.parent) == ["dst"] and tree(target) == quick.reference
    assert seen == {True, False}


def test_killed_while_replacing_there_is_the_old_folder_none_or_the_new_one(quick, tmp_path, monkeypatch):
    target = tmp_path / "out" / "dst"
    old = {PRUNING_FILE: b"{}", "model.safetensors": b"old", "config.json": b"old", "sub/file": b"old"}

    def begin():
        shutil.rmtree(target.parent, ignore_errors=True)
        target.mkdir(parents=True)
        write_all(target, old)

    begin()
    points = count_points(monkeypatch, WRITES + REMOVALS, lambda: quick(target))
    seen = []
    for number in range(points - 14, points + 1):
        begin()

        def work(number=number):
            die_at(monkeypatch, number)
            quick(target)

        assert forked(work) == (0 if number == points else -signal.SIGKILL)
        seen.append("none" if not target.exists() else {True: "old", False: "new"}[tree(target) == old])
        assert seen[-1] != "new" or tree(target) == quick.reference
        quick(target)
        assert os.listdir(target.parent) == ["dst"] and tree(target) == quick.reference
    assert list(dict.fromkeys(seen)) == ["old", "none", "new"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_fills_up_at_any_point_leaves_what_was_there(quick, tmp_path, monkeypatch, exists):
    target = tmp_path / "out" / "dst"
    old = {PRUNING_FILE: b"{}", "model.safetensors": b"old"}

    def begin():
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        if exists:
            target.mkdir()
            write_all(target, old)

    begin()
    points = count_points(monkeypatch, WRITES, lambda: quick(target))
    for number in range(points):
        begin()
        count = iter(range(10**9))

        def reached(name, count=count, number=number):
            here = next(count)
            if here == number or (here > number and name != "replace"):  # renaming back needs no space
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with (
            monkeypatch.context() as patch,
            pytest.raises(ResourceError, match="disk is full: free some space"),
        ):
            instrument(patch, reached, WRITES)
            quick(target)
        left = tree(target) if target.exists() else None
        assert left == quick.reference or left == (old if exists else None)
        assert os.listdir(target.parent) == (["dst"] if left else [])


def test_a_limit_that_the_kernel_sets(quick, tmp_path):
    def work(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        quick(tmp_path / "out" / "dst")

    for limit in (1_000, 10_000, 50_000):
        assert forked(lambda limit=limit: work(limit)) == 10 + ResourceError.exit_code
        assert os.listdir(tmp_path / "out") == []
    assert forked(lambda: work(10**6)) == 0
    assert tree(tmp_path / "out" / "dst") == quick.reference


def test_a_folder_that_may_not_be_written_or_even_seen(saved):
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        shutil.copytree(saved, home / "src", copy_function=shutil.copyfile)  # safetensors says 0600
        for parent, mode in (("sealed", 0o000), ("read only", 0o555)):
            (home / parent).mkdir(mode=mode)

        def work(parent):
            if os.getuid() == 0:
                os.setuid(65534)
            with pytest.raises(ResourceError, match=r"Cannot write .*dst: Permission denied\. Is the folder"):
                prune_checkpoint(home / "src", home / parent / "dst", DROPPING)

        for parent in ("sealed", "read only"):
            assert forked(lambda parent=parent: work(parent)) == 0
            assert os.listdir(home / parent) == []


@pytest.mark.parametrize("exists", [False, True])
def test_two_processes_with_one_destination(quick, tmp_path, monkeypatch, exists):
    target, gate = tmp_path / "out" / "dst", tmp_path / "gate"
    gate.mkdir()
    describe = streaming.describe_model

    def meet(*args, **options):
        describe(*args, **options)
        (gate / str(os.getpid())).touch()
        deadline = time.monotonic() + 10
        while len(os.listdir(gate)) < 2 and time.monotonic() < deadline:
            pass

    def work():
        monkeypatch.setattr(streaming, "describe_model", meet)
        quick(target)

    for _ in range(4):
        shutil.rmtree(target.parent, ignore_errors=True)
        for name in os.listdir(gate):
            (gate / name).unlink()
        if exists:
            quick(target)
        children = [started(work), started(work)]
        assert sorted(map(status_of, children)) in ([0, 0], [0, 10 + ConfigError.exit_code])
        assert tree(target) == quick.reference and os.listdir(target.parent) == ["dst"]


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_modes_are_those_the_umask_allows(quick, tmp_path, mask):
    target = tmp_path / "out" / "dst"
    assert forked(lambda: (os.umask(mask), quick(target))) == 0
    for path in (target.parent, target, *target.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == expected, path


# -- the staged folder -----------------------------------------------------------------------------------


def fill(folder, content=b"new"):
    write_all(folder, {"weights": content, "deep/er": content, PRUNING_FILE: b"{}"})


def test_every_file_and_folder_is_durable_before_the_rename(tmp_path, monkeypatch):
    events = []
    for name in ("make_durable", "sync_folder"):
        monkeypatch.setattr(folder_module, name, lambda path: events.append(path.name))
    monkeypatch.setattr(os, "replace", lambda *args: events.append("replace") or os.rename(*args))
    with staged_folder(tmp_path / "dst") as staged:
        fill(staged)
    names = {"weights", "deep", "er", PRUNING_FILE, staged.name}
    assert set(events[: len(names)]) == names
    assert events[len(names) :] == ["replace", tmp_path.name]


def test_leftovers_that_nobody_holds_go_and_those_of_living_writers_stay(tmp_path):
    name, dead = "a[b]*.c", 4711
    random = "0123456789abcdef"
    gone = [f".{name}.{random}.part", f".{name}.old.{random}.part", f".{name}.{dead}.part"]
    stay = [f".{name}.{random}f.part", f".{name}.x.part", f".ab.c.{random}.part", f".{name}.{dead}", "a[b]"]
    for folder in (*gone, *stay):
        (tmp_path / folder).mkdir()
        fill(tmp_path / folder)
    (tmp_path / f".{name}.{random}e.part").symlink_to(tmp_path / "a[b]")  # not ours: we make no links
    with held(tmp_path / stay[0]), staged_folder(tmp_path / name) as staged:
        fill(staged)
    assert sorted(os.listdir(tmp_path)) == sorted([name, *stay, f".{name}.{random}e.part"])
    assert (tmp_path / "a[b]" / "weights").exists()


def test_two_writers_of_one_process_do_not_mix_their_folders(tmp_path):
    target = tmp_path / "dst"
    with staged_folder(target) as first:
        (first / "one").write_text("A")
        with staged_folder(target) as second:
            assert second != first and first.exists()
            (second / "two").write_text("B")
            fill(second)
        assert sorted(os.listdir(target)) == sorted(["two", "weights", "deep", PRUNING_FILE])
        fill(first)
    assert sorted(os.listdir(target)) == sorted(["one", "weights", "deep", PRUNING_FILE])
    assert os.listdir(tmp_path) == ["dst"]


def test_the_staged_folder_of_the_longest_name_a_disk_allows(tmp_path):
    target = tmp_path / ("x" * 255)
    with staged_folder(target) as staged:
        fill(staged)
    assert os.listdir(tmp_path) == [target.name]
    with pytest.raises(ConfigError, match="cannot be used: File name too long"):
        check_output(tmp_path / ("x" * 256), marker=PRUNING_FILE)
    with pytest.raises(ConfigError, match="cannot be used"):
        check_output(tmp_path / "a\0b", marker=PRUNING_FILE)


def test_an_error_inside_leaves_the_old_folder(tmp_path):
    target = tmp_path / "dst"
    for error in (KeyboardInterrupt, ValueError, ConfigError):
        target.mkdir(exist_ok=True)
        fill(target, b"old")
        with pytest.raises(error), staged_folder(target) as staged:
            fill(staged)
            raise error("x")
        assert os.listdir(tmp_path) == ["dst"] and (target / "weights").read_bytes() == b"old"


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    target, rename = tmp_path / "dst", os.replace
    target.mkdir()
    fill(target, b"old")

    def fail(source, to):
        if str(source).endswith(".part") and to == target and ".old." not in str(source):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ResourceError, match="Permission denied"), staged_folder(target) as staged:
        fill(staged)
    assert os.listdir(tmp_path) == ["dst"] and (target / "weights").read_bytes() == b"old"


def test_what_somebody_else_wrote_meanwhile_is_not_touched(tmp_path):
    for make in (
        lambda path: path.write_bytes(b"x"),
        lambda path: write_all(tmp_path, {f"{path.name}/x": b""}),
    ):
        target = tmp_path / f"dst{len(os.listdir(tmp_path))}"
        with (
            pytest.raises(ConfigError, match="was written by another process"),
            staged_folder(target) as staged,
        ):
            fill(staged)
            make(target)
        assert target.exists() and not (target / PRUNING_FILE).exists() and not list(tmp_path.glob(".*"))


def test_an_empty_folder_a_link_and_the_current_folder_can_be_the_target(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target, place in (("../link", "real"), ("../link", "real"), (".", "here")):
        with staged_folder(Path(target)) as staged:
            fill(staged)
        assert (tmp_path / place / "weights").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["here", "link", "real"]


def test_a_parent_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ResourceError, match=r"Cannot write .*dst: "),
        staged_folder(tmp_path / "file" / "dst"),
    ):
        pass


def test_the_fingerprint_is_that_of_the_loaded_model(saved, llama):
    assert Blueprint(saved, DROPPING).fingerprint == fingerprint(llama)
