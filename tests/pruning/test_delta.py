import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_trace
from families import KEEP as FAMILY_KEEP
from families import SPECIAL_KEEP, make_family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gradpruner.pruning.delta as module
import gradpruner.pruning.delta_record as record_module
import gradpruner.pruning.rebuilding as rebuilding
from gradpruner.common.errors import ConfigError, IntegrityError, ModelError, PlanError, ResourceError
from gradpruner.common.json_files import write_json
from gradpruner.common.provenance import sha256_json
from gradpruner.models.folder import carried_files, describe_model
from gradpruner.models.shards import open_shards
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.pruning import writer
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.checked import reading
from gradpruner.pruning.delta import diff_checkpoint
from gradpruner.pruning.delta_record import read_record
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.pruning.pieces import header_of, pack
from gradpruner.pruning.rebuilding import rebuild_checkpoint
from gradpruner.pruning.writer import write_shards

KEEP, DROP = LayerAction("keep"), LayerAction("drop")
DROPPING = PruningPlan((KEEP, DROP, KEEP, KEEP, DROP, KEEP))
MERGING = PruningPlan((KEEP, DROP, KEEP, LayerAction("merge", 2), LayerAction("merge", 2), KEEP))
PLANS = {"merging": MERGING, "dropping": DROPPING}
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
TEMPLATE = "additional_chat_templates/tool.jinja"


def content(folder):
    """Every file of a folder by its path, as bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def add_small_files(folder):
    (folder / "tokenizer.json").write_text('{"ä": 1}\n', encoding="utf-8")
    (folder / "LICENSE").write_bytes(b"do what you like\r\n\0")
    (folder / TEMPLATE).parent.mkdir()
    (folder / TEMPLATE).write_text("{{ messages }}", encoding="utf-8")


def write_pruned(source, folder, plan, trace=None, max_bytes=10**9):
    """What prune_checkpoint writes, without the checks, which take most of its time."""
    folder.mkdir()
    blueprint = Blueprint(source, plan, trace)
    with reading() as reader:
        for shard in write_shards(folder, pack(blueprint.pieces(), max_bytes), {"format": "pt"}, reader):
            shard.result()
    write_json(folder / "config.json", blueprint.new_config())
    for path in carried_files(blueprint.source):
        (folder / path.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(source))
    describe_model(folder, plan=plan, source=str(source), kind="model")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_power_cuts():
    """Without waiting for the disk, which takes longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("delta")


@pytest.fixture(scope="module")
def trace():
    return make_trace(make_model())


@pytest.fixture(scope="module")
def sources(home):
    """The same model in one file and in several."""
    folders = {"single": home / "single", "sharded": home / "sharded"}
    make_model().save_pretrained(folders["single"])
    make_model().save_pretrained(folders["sharded"], max_shard_size="60KB")
    for folder in folders.values():
        add_small_files(folder)
    assert len(open_shards(folders["sharded"]).headers) > 3
    return folders


@pytest.fixture(scope="module")
def pruned(home, sources, trace):
    """Pruned by a plan from one layout into another."""
    made = {}
    for layout, size in (("single", 10**9), ("sharded", 40_000)):
        made["merging", layout] = home / f"merging-{layout}"
        prune_checkpoint(
            sources[layout],
            made["merging", layout],
            MERGING,
            trace,
            max_shard_bytes=size,
            verify="structure",
        )
        made["dropping", layout] = write_pruned(
            sources[layout], home / f"dropping-{layout}", DROPPING, max_bytes=10**9 + 40_000 - size
        )
    return made


@pytest.fixture(scope="module")
def deltas(home, sources, pruned):
    made = {}
    for (plan, layout), folder in pruned.items():
        made[plan, layout] = home / f"delta-{plan}-{layout}"
        diff_checkpoint(sources[layout], folder, made[plan, layout])
    return made


@pytest.fixture
def given_delta(deltas, tmp_path):
    """A delta of the sharded source with merged tensors, to be damaged."""
    return shutil.copytree(deltas["merging", "sharded"], tmp_path / "delta")


@pytest.fixture
def given_source(sources, tmp_path):
    return shutil.copytree(sources["sharded"], tmp_path / "source")


@pytest.fixture
def given_pruned(pruned, tmp_path):
    return shutil.copytree(pruned["merging", "sharded"], tmp_path / "pruned")


def refused(error, match, source, delta, out):
    """Rebuilding is refused, and nothing is left."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match):
        rebuild_checkpoint(source, delta, out)
    assert sorted(out.parent.iterdir()) == before and not out.exists()


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def forge(delta, change):
    """Changes delta.json as somebody would who knows how it is sealed."""
    path = delta / "delta.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    record["sha256"] = sha256_json({k: v for k, v in record.items() if k != "sha256"})
    path.write_text(json.dumps(record), encoding="utf-8")


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [(p, s) for p in PLANS for s in ("single", "sharded")])
def test_what_is_rebuilt_is_the_checkpoint_to_the_last_bit(key, sources, pruned, deltas, tmp_path):
    for layout in sources:  # also from another layout than the delta was made from
        out = rebuild_checkpoint(sources[layout], deltas[key], tmp_path / layout)
        assert out == tmp_path / layout
        assert content(out) == content(pruned[key])
        assert TEMPLATE in content(out)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "sharded", tmp_path / "single"]


def test_only_merged_tensors_are_stored(sources, pruned, deltas, tmp_path):
    summary = diff_checkpoint(sources["single"], pruned["merging", "single"], tmp_path / "delta")
    with safe_open(tmp_path / "delta/tensors.safetensors", "pt") as file:
        stored = set(file.keys())
    assert stored == {f"model.layers.1.{name}.weight" for name in LINEARS}
    assert summary.stored == len(LINEARS)
    assert summary.copied == len(open_shards(pruned["merging", "single"]).tensors) - len(LINEARS)
    assert summary.folder == str(tmp_path / "delta")
    sizes = {name: len(data) for name, data in content(tmp_path / "delta").items()}
    assert summary.num_bytes == sum(sizes.values())
    tensors = open_shards(pruned["merging", "single"]).tensors
    merged = sum(tensors[name].num_bytes for name in stored)
    assert merged < sizes.pop("tensors.safetensors") < merged + 1000  # its header
    checkpoint = {name: len(data) for name, data in content(pruned["merging", "single"]).items()}
    assert summary.checkpoint_bytes == sum(checkpoint.values())
    weights = checkpoint.pop("model.safetensors")
    assert sum(sizes.values()) < weights / 5 + sum(checkpoint.values())  # headers and delta.json: per tensor
    assert not (deltas["dropping", "single"] / "tensors.safetensors").exists()


def test_delta_names_what_it_was_made_from(sources, deltas):
    record = json.loads((deltas["merging", "single"] / "delta.json").read_text(encoding="utf-8"))
    assert record["source"] == str(sources["single"])
    assert PruningPlan.from_dict(record["plan"]) == MERGING
    entry = record["copied"]["model.layers.2.mlp.up_proj.weight"]
    assert entry["source"] == "model.layers.5.mlp.up_proj.weight"


def test_progress_adds_up(sources, pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHECK_BYTES", 1000)  # tensors of several blocks
    folder, steps = pruned["merging", "sharded"], []
    diff_checkpoint(sources["sharded"], folder, tmp_path / "delta", progress=steps.append)
    shards = open_shards(folder)
    assert sum(steps) == shards.total_bytes + sum(header.file_bytes for header in shards.headers)
    steps.clear()
    rebuild_checkpoint(sources["sharded"], tmp_path / "delta", tmp_path / "out", progress=steps.append)
    assert sum(steps) == open_shards(folder).total_bytes
    assert content(tmp_path / "out") == content(folder)


def family_source(model_type, folder):
    options = {"tie_word_embeddings": True} if model_type == "qwen2" else {}
    make_family_model(model_type, **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["qwen2", "mixtral", "gpt2", "gemma3n_text"])
def test_families(model_type, tmp_path):
    source = family_source(model_type, tmp_path / "source")
    plan = PruningPlan.from_keep(12, SPECIAL_KEEP.get(model_type, FAMILY_KEEP))
    folder = write_pruned(source, tmp_path / "pruned", plan)
    summary = diff_checkpoint(source, folder, tmp_path / "delta")
    assert (summary.stored > 0) == (model_type == "gemma3n_text")  # tensors with a slice per layer
    rebuild_checkpoint(source, tmp_path / "delta", tmp_path / "out")
    assert content(tmp_path / "out") == content(folder)


def test_quantised(sources, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((sources["single"] / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    write_json(source / "config.json", config)
    tensors = {}
    for name, value in load_file(sources["single"] / "model.safetensors").items():
        quantised = name.endswith("_proj.weight")
        tensors[name] = value.to(torch.float8_e4m3fn) if quantised else value
        if quantised:
            tensors[f"{name}_scale_inv"] = torch.rand(2, 2)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    folder = write_pruned(source, tmp_path / "pruned", DROPPING)
    assert diff_checkpoint(source, folder, tmp_path / "delta").stored == 0
    rebuild_checkpoint(source, tmp_path / "delta", tmp_path / "out")
    assert content(tmp_path / "out") == content(folder)


def as_snapshot(folder, place):
    """The folder as huggingface_hub caches it: links into blobs."""
    snapshot, blobs = place / "models--org--name/snapshots/abc", place / "models--org--name/blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(content(folder).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    return snapshot


def test_all_in_the_hub_cache(sources, pruned, tmp_path):
    source = as_snapshot(sources["sharded"], tmp_path / "a")
    folder = as_snapshot(pruned["merging", "sharded"], tmp_path / "b")
    diff_checkpoint(source, folder, tmp_path / "delta")
    delta = as_snapshot(tmp_path / "delta", tmp_path / "c")
    rebuild_checkpoint(source, delta, tmp_path / "out")
    assert content(tmp_path / "out") == content(pruned["merging", "sharded"])


def test_headers_and_values_of_other_writers(sources, tmp_path):
    source = shutil.copytree(sources["single"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")  # a hash needs no numbers
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    folder = write_pruned(sources["single"], tmp_path / "pruned", DROPPING)
    pieces = Blueprint(source, DROPPING).pieces()[::-1]
    entries = json.loads(header_of(pieces, {})[8:])
    text = json.dumps(dict(sorted(entries.items())) | {"__metadata__": {"by": "hand"}}, indent=3)
    text = text.encode() + b" " * 777
    data = b"".join(p.ref.file.read_bytes()[p.ref.start : p.ref.stop] for p in pieces)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / ".gitattributes").write_text("hidden", encoding="utf-8")
    assert diff_checkpoint(source, folder, tmp_path / "delta").stored == 0
    rebuild_checkpoint(source, tmp_path / "delta", tmp_path / "out")
    expected = content(folder)
    del expected[".gitattributes"]
    assert content(tmp_path / "out") == expected


@st.composite
def plans(draw):
    kept = sorted(draw(st.sets(st.integers(0, 5), min_size=2, max_size=5)))
    options = [DROP, *(LayerAction("merge", i) for i in kept)]
    return PruningPlan(tuple(KEEP if i in kept else draw(st.sampled_from(options)) for i in range(6)))


@settings(max_examples=8, deadline=None)
@given(plan=plans(), size=st.integers(1, 200_000), layout=st.sampled_from(["single", "sharded"]))
def test_any_plan(sources, trace, tmp_path_factory, plan, size, layout):
    place = tmp_path_factory.mktemp("any")
    folder = write_pruned(sources[layout], place / "pruned", plan, trace, size)
    tensors = open_shards(folder).tensors
    merged = [f"model.layers.{plan.keep.index(i)}.{name}.weight" for i in plan.merged for name in LINEARS]
    share = sum(tensors[name].num_bytes for name in merged) / open_shards(folder).total_bytes
    if share > 0.5:
        with pytest.raises(ConfigError, match=f"{len(merged)} of {len(tensors)} tensors"):
            diff_checkpoint(sources[layout], folder, place / "delta")
        assert not (place / "delta").exists()
        return
    assert diff_checkpoint(sources[layout], folder, place / "delta").stored == len(merged)
    rebuild_checkpoint(sources[layout], place / "delta", place / "out")
    assert content(place / "out") == content(folder)


# --- what cannot be a delta ---------------------------------------------------------------------------------


def no_diff(error, match, source, folder, out):
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        diff_checkpoint(source, folder, out)
    assert sorted(out.parent.iterdir()) == before
    return caught.value


def test_fine_tuned_after_pruning(given_source, given_pruned, tmp_path):
    for path in given_pruned.glob("*.safetensors"):
        tensors = {name: value + 0.001 for name, value in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    error = no_diff(
        ConfigError,
        r"30 of 30 tensors .* store ([\d.]+ KiB) of \1",
        given_source,
        given_pruned,
        tmp_path / "d",
    )
    assert "adapters" in str(error.hint)


def test_another_dtype(sources, tmp_path):
    folder = write_pruned(sources["single"], tmp_path / "pruned", DROPPING)
    tensors = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    no_diff(ConfigError, "39 of them have another dtype", sources["single"], folder, tmp_path / "d")


def change_json(path, change):
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def test_folders_that_were_not_pruned(given_source, given_pruned, tmp_path):
    out = tmp_path / "d"
    no_diff(ConfigError, "There is no pruned checkpoint at", given_source, tmp_path / "no", out)
    no_diff(ConfigError, "has no pruning.json", given_source, given_source, out)
    change_json(given_pruned / "pruning.json", lambda record: record.update(plan=None))
    no_diff(ConfigError, "holds no plan", given_source, given_pruned, out)
    change_json(given_pruned / "pruning.json", lambda record: record.update(plan={"actions": 1}))
    no_diff(PlanError, "actions", given_source, given_pruned, out)
    no_diff(ModelError, "no model folder", tmp_path / "nothing/at/all", given_pruned, out)


def test_sources_that_are_not_the_one(sources, given_pruned, trace, tmp_path):
    out, others = tmp_path / "d", tmp_path / "others"
    for name, options in {
        "deep": {"num_hidden_layers": 7},
        "wide": {"intermediate_size": 64},
        "tied": {"tie_word_embeddings": True},
        "seed": {"seed": 1},
    }.items():
        make_model(**options).save_pretrained(others / name)
    no_diff(
        ConfigError, "plan is for a model of 6 layers; this one has 7", others / "deep", given_pruned, out
    )
    no_diff(
        ConfigError, r"the shape \(32, 48\); .* have the shape \(32, 64\)", others / "wide", given_pruned, out
    )
    no_diff(ConfigError, "'lm_head.weight' .* would not exist", others / "tied", given_pruned, out)
    no_diff(ConfigError, "30 of 30 tensors", others / "seed", given_pruned, out)
    evidence = {"model": trace.info.model}
    change_json(given_pruned / "pruning.json", lambda record: record["plan"].update(evidence=evidence))
    error = no_diff(ConfigError, "The plan was made from model", others / "seed", given_pruned, out)
    assert str(sources["sharded"]) in str(error.hint)


def test_outputs_that_are_not_free(sources, given_pruned, given_delta, tmp_path):
    diff = partial(diff_checkpoint, sources["sharded"], given_pruned)
    before = content(given_delta)
    with pytest.raises(ConfigError, match="holds a delta"):
        diff(given_delta)
    assert content(given_delta) == before
    for out in (sources["sharded"], given_pruned, given_pruned / "inside", tmp_path):
        with pytest.raises(ConfigError, match=r"is the input|lies inside|not empty"):
            diff(out)
    (tmp_path / "empty").mkdir()
    assert diff(tmp_path / "empty").stored == len(LINEARS)


def test_files_that_no_delta_holds(sources, given_pruned, tmp_path, monkeypatch):
    out = tmp_path / "d"
    (given_pruned / "original").mkdir()
    no_diff(ConfigError, "original .* a delta can hold", sources["sharded"], given_pruned, out)
    (given_pruned / "original").rmdir()
    (given_pruned / "a\\b").touch()
    no_diff(ConfigError, r"a\\b .* plain name", sources["sharded"], given_pruned, out)
    (given_pruned / "a\\b").unlink()
    monkeypatch.setattr(module, "SMALL_FILE_LIMIT", 100)
    no_diff(ConfigError, "a delta can hold", sources["sharded"], given_pruned, out)
    monkeypatch.undo()
    (given_pruned / "notes.txt").symlink_to("/etc/hostname")
    no_diff(IntegrityError, "outside the model folder", sources["sharded"], given_pruned, out)


def test_weights_that_changed_since_they_were_pruned(sources, given_pruned, tmp_path):
    name = sorted(given_pruned.glob("*.safetensors"))[1]
    flip(name, -2)
    error = no_diff(
        IntegrityError, f"{name.name} has changed since", sources["sharded"], given_pruned, tmp_path / "d"
    )
    assert "Prune again" in str(error.hint)


# --- what is not rebuilt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 30, -1, -5000])
def test_a_damaged_tensors_file(where, given_source, given_delta, tmp_path):
    flip(given_delta / "tensors.safetensors", where)
    refused(IntegrityError, "tensors.safetensors is damaged", given_source, given_delta, tmp_path / "out")


def test_every_other_file_of_a_delta_damaged_cut_or_missing(given_source, given_delta, tmp_path):
    for path in sorted(p for p in given_delta.rglob("*") if p.is_file()):
        data, match = path.read_bytes(), path.name
        flip(path, len(data) // 2)
        refused(IntegrityError, match, given_source, given_delta, tmp_path / "out")
        path.write_bytes(data[:-2])
        refused(IntegrityError, match, given_source, given_delta, tmp_path / "out")
        path.unlink()
        refused(IntegrityError, match, given_source, given_delta, tmp_path / "out")
        path.mkdir()
        refused(IntegrityError, match, given_source, given_delta, tmp_path / "out")
        path.rmdir()
        path.write_bytes(data)
    assert rebuild_checkpoint(given_source, given_delta, tmp_path / "out")


def test_links_out_of_a_delta(given_source, given_delta, tmp_path):
    for name in ("files/LICENSE", "tensors.safetensors", "delta.json"):
        outside = tmp_path / "outside"
        (given_delta / name).rename(outside)
        (given_delta / name).symlink_to(outside)
        refused(IntegrityError, "outside the model folder", given_source, given_delta, tmp_path / "out")
        (given_delta / name).unlink()
        outside.rename(given_delta / name)


def leaves(value, path=()):
    """The paths of all plain values in JSON."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def test_every_field_of_the_record_is_sealed(deltas, tmp_path):
    delta = shutil.copytree(deltas["merging", "single"], tmp_path / "delta")
    text = (delta / "delta.json").read_text(encoding="utf-8")
    paths = list(leaves(json.loads(text)))
    assert len(paths) > 80
    for path in paths:
        record = json.loads(text)
        inner = record
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = inner[path[-1]] + 1 if isinstance(inner[path[-1]], int) else "0"
        (delta / "delta.json").write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(IntegrityError, match="not the record of a delta"):
            read_record(delta)


HOSTILE = [
    "../evil", "/evil", "..", ".", "", ".hidden", "a/b", "a\\b", "C:evil", "a\0b", "a\nb", "files/../x",
    "additional_chat_templates/../x", "additional_chat_templates/", "additional_chat_templates/a/b",
]  # fmt: skip


def test_names_that_are_no_plain_names(given_source, given_delta, tmp_path):
    text = (given_delta / "delta.json").read_text(encoding="utf-8")

    def rename(where, name, record):
        record[where][name] = record[where].popitem()[1]

    for name in HOSTILE:
        for where, end in (("files", ""), ("weights", ".safetensors"), ("headers", ".safetensors")):
            (given_delta / "delta.json").write_text(text, encoding="utf-8")
            forge(given_delta, partial(rename, where, name + end))
            match = f"{where} names the file"
            refused(IntegrityError, match, given_source, given_delta, tmp_path / "out")
    assert not (tmp_path / "evil").exists() and not Path("/evil").exists()


ENTRY = {"sha256": "0" * 64, "bytes": 1}
FORGED = {
    "format_version is 2": lambda r: r.update(format_version=2),
    "format_version is True": lambda r: r.update(format_version=True),
    "unknown field 'more'": lambda r: r.update(more=1),
    "source: Input should be a valid string": lambda r: r.update(source=["x"]),
    "gradpruner_version: Input should be a valid string": lambda r: r.update(gradpruner_version=None),
    "its plan is wrong": lambda r: r["plan"].update(actions=[]),
    "files: Input should be an object": lambda r: r.update(files=[]),
    "files.LICENSE.bytes: Field required": lambda r: r["files"].update(LICENSE={"sha256": "0" * 64}),
    "files.LICENSE.sha256: String should match": lambda r: r["files"]["LICENSE"].update(sha256="A" * 64),
    "bytes: Input should be greater": lambda r: r["files"]["LICENSE"].update(bytes=-1),
    "missing or unknown": lambda r: r["files"]["LICENSE"].update(more=1),
    "README.md.bytes: Input should be a valid integer": lambda r: r["files"]["README.md"].update(bytes=True),
    "tensors: Input should be an object": lambda r: r.update(tensors="x"),
    "copied: Input should be an object": lambda r: r.update(copied=None),
    "copied.x.source: Field required": lambda r: r["copied"].update(x={"sha256": "0" * 64}),
    "copied.x.source: Input should be a valid string": lambda r: r["copied"].update(
        x={"source": 1, "sha256": "0" * 64}
    ),
    "stored: Input should be a valid array": lambda r: r.update(stored={"x": 1}),
    "stored and copied name a tensor twice": lambda r: r["stored"].append(next(iter(r["copied"]))),
    "tensors are stored without": lambda r: r.update(tensors=None),
    "do not name the same files": lambda r: r["weights"].popitem(),
    "more than 100000000 bytes": lambda r: next(iter(r["headers"].values())).update(bytes=10**9),
    "weights and files name the same file": lambda r: r["files"].update({next(iter(r["weights"])): ENTRY}),
    "does not name pruning.json": lambda r: r["files"].pop("pruning.json"),
    "does not hold the tensors": lambda r: r["stored"].pop(),
    "does not name or": lambda r: r["copied"].pop("model.norm.weight"),
    "No header names the tensor 'more'": lambda r: r["copied"].update(more=r["copied"]["model.norm.weight"]),
    "not the header of weights": lambda r: next(iter(r["weights"].values())).update(bytes=5000),
    "has no tensor 'x'": lambda r: r["copied"]["model.norm.weight"].update(source="x"),
    r"is F32 \(64, 32\); the delta needs F32 \(32,\)": lambda r: r["copied"]["model.norm.weight"].update(
        source="lm_head.weight"
    ),
    "every tensor of the source is the right one": lambda r: r["weights"].update(
        {name: entry | {"sha256": "0" * 64} for name, entry in r["weights"].items()}
    ),
    "1 of 23 tensors .*'model.norm.weight' in": lambda r: (
        r["copied"]["model.norm.weight"].update(sha256="0" * 64)
        or r["weights"].update({name: entry | {"sha256": "0" * 64} for name, entry in r["weights"].items()})
    ),
}


@pytest.mark.parametrize("match", FORGED)
def test_records_that_no_diff_writes(match, sources, deltas, tmp_path):
    delta = shutil.copytree(deltas["merging", "single"], tmp_path / "delta")
    forge(delta, FORGED[match])
    refused(IntegrityError, match, sources["single"], delta, tmp_path / "out")


NO_RECORDS = ["", "[]", "null", "[" * 100_000, "9" * 5000, '{"a": NaN}', '{"format_version": 1}']


@pytest.mark.parametrize("text", NO_RECORDS, ids=range(len(NO_RECORDS)))
def test_records_that_are_no_records(text, given_source, given_delta, tmp_path, monkeypatch):
    (given_delta / "delta.json").write_text(text, encoding="utf-8")
    refused(IntegrityError, "not the record of a delta", given_source, given_delta, tmp_path / "out")
    (given_delta / "delta.json").write_bytes(b"\xff")
    refused(IntegrityError, "not the record of a delta", given_source, given_delta, tmp_path / "out")
    monkeypatch.setattr(record_module, "RECORD_LIMIT", 0)
    refused(IntegrityError, "more than 0 bytes", given_source, given_delta, tmp_path / "out")


def test_a_surrogate_in_a_sealed_record(given_source, given_delta, tmp_path):
    change_json(given_delta / "delta.json", lambda record: record.update(source="\ud800"))
    refused(IntegrityError, "not the record of a delta", given_source, given_delta, tmp_path / "out")


def test_a_header_with_something_behind_it(sources, deltas, tmp_path):
    delta = shutil.copytree(deltas["merging", "single"], tmp_path / "delta")
    path = delta / "headers/model.safetensors.header"
    path.write_bytes(path.read_bytes() + bytes(8))
    digest = module.sha256_file(path)
    entry = {"sha256": digest, "bytes": path.stat().st_size}
    forge(delta, lambda record: record["headers"].update({"model.safetensors": entry}))
    refused(IntegrityError, "the header in it", sources["single"], delta, tmp_path / "out")


def test_one_flipped_bit_of_the_source_is_named(given_source, given_delta, tmp_path):
    ref = open_shards(given_source).tensors["model.layers.5.mlp.up_proj.weight"]
    flip(ref.file, ref.stop - 3)
    match = rf"1 of \d+ tensors .*'{ref.name}' in {ref.file}.*or is damaged"
    refused(IntegrityError, match, given_source, given_delta, tmp_path / "o")


def test_damage_in_a_pruned_layer_does_not_matter(given_source, given_delta, pruned, tmp_path):
    ref = open_shards(given_source).tensors["model.layers.4.mlp.up_proj.weight"]
    flip(ref.file, ref.start)
    rebuild_checkpoint(given_source, given_delta, tmp_path / "out")
    assert content(tmp_path / "out") == content(pruned["merging", "sharded"])


def test_sources_the_delta_was_not_made_from(given_delta, given_source, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "seed")
    refused(
        IntegrityError, "another revision, was fine-tuned", tmp_path / "seed", given_delta, tmp_path / "out"
    )
    make_model().bfloat16().save_pretrained(tmp_path / "dtype")
    refused(IntegrityError, r"is BF16 .* needs F32", tmp_path / "dtype", given_delta, tmp_path / "out")
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    refused(
        IntegrityError, "has no tensor 'lm_head.weight'", tmp_path / "tied", given_delta, tmp_path / "out"
    )
    refused(IntegrityError, "has no delta.json", given_source, given_source, tmp_path / "out")
    refused(ConfigError, "There is no delta at", given_source, tmp_path / "no", tmp_path / "out")
    refused(ModelError, "no model folder", tmp_path / "not/a/model", given_delta, tmp_path / "out")
    next(given_source.glob("model-00002-*")).unlink()
    refused(IntegrityError, "missing", given_source, given_delta, tmp_path / "out")


def test_outputs_of_a_rebuild(given_source, given_delta, pruned, tmp_path):
    for out in (given_source, given_delta, given_delta / "inside", tmp_path):
        with pytest.raises(ConfigError, match=r"is the input|lies inside|not empty"):
            rebuild_checkpoint(given_source, given_delta, out)
    older = shutil.copytree(pruned["dropping", "sharded"], tmp_path / "older")
    before = content(older)
    flip(given_delta / "files/README.md")
    with pytest.raises(IntegrityError, match=r"README.md"):
        rebuild_checkpoint(given_source, given_delta, older)
    assert content(older) == before
    flip(given_delta / "files/README.md")
    rebuild_checkpoint(given_source, given_delta, older)  # one of ours is replaced
    assert content(older) == content(pruned["merging", "sharded"])


@pytest.mark.parametrize("name", ["write_file", "_check_file", "read_header"])
def test_an_interrupted_rebuild_leaves_nothing(name, given_source, given_delta, tmp_path, monkeypatch):
    calls, real = [], getattr(rebuilding, name)

    def interrupted(*args, **options):
        calls.append(args)
        if args[0].name.startswith(".out") or ".out." in str(args[0]):
            real(*args, **options)
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(rebuilding, name, interrupted)
    refused(KeyboardInterrupt, None, given_source, given_delta, tmp_path / "out")
    assert calls


def test_an_interrupted_diff_leaves_nothing(sources, given_pruned, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    for name in ("write_file", "write_json"):
        monkeypatch.setattr(module, name, interrupted)
        no_diff(KeyboardInterrupt, None, sources["sharded"], given_pruned, tmp_path / "d")
        monkeypatch.undo()


def test_disks_that_are_too_small(given_source, given_delta, given_pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    refused(ResourceError, "The rebuilt checkpoint needs", given_source, given_delta, tmp_path / "out")
    no_diff(ResourceError, "The delta needs", given_source, given_pruned, tmp_path / "d")
