"""One answer to "can this folder be used?", whichever command asks; and configs written by strangers."""

import json

import pytest
import torch
import transformers as T
from builders import VOCABULARY, make_llama, make_rows, write_rows
from safetensors.torch import load_file, save_file
from seeing import MIXED, SEEING, TEXT, qwen3_vl, saved

from gradpruner.common.errors import GradPrunerError, IntegrityError, ModelError
from gradpruner.evaluation.costing.comparison import measure_cost
from gradpruner.evaluation.costing.subject import find_subject
from gradpruner.evaluation.costing.workload import Workload
from gradpruner.models.checking import check_model_folder, is_model_folder
from gradpruner.models.dtypes import cast_like, stored_dtype
from gradpruner.models.layers import LayeredModel
from gradpruner.models.loading import check_loadable, load_config, load_model, load_structure
from gradpruner.models.raw_config import beyond_fields, quantised_parts
from gradpruner.models.saving import save_model
from gradpruner.models.sizes import ModelSizes, build_on_meta, count_parameters
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.on_disk import prune_checkpoint


def edit(folder, **changes):
    """Sets fields of a config.json; dots lead into sections."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        part = config
        for key in above:
            part = part[key]
        part[last] = value
    path.write_text(json.dumps(config))
    return folder


def rewrite(folder, change):
    """Changes the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def llama(tmp_path):
    return saved(make_llama(), tmp_path / "model")


SMALL = Workload(tokens=4, new_tokens=2, device="cpu")


def answers(folder, tmp_path):
    """What everything that opens a model folder says of it: "" when it is taken, else the message."""

    def said(action):
        try:
            action()
        except GradPrunerError as error:
            return str(error)
        return ""

    plan = PruningPlan.from_keep(4, [0, 1, 3])
    return {
        "run, compare, shrink, evaluate": said(lambda: check_loadable(folder)),
        "prune, verify": said(lambda: Blueprint(folder, plan)),
        "cost": said(lambda: find_subject(folder)),
        "cost --dry-run": said(lambda: measure_cost(folder, plan, SMALL, dry_run=True)),
        "load": said(lambda: load_model(folder, device="cpu")),
    }


# -- models that also see ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEING)
def test_models_that_also_see_are_taken_by_every_command_and_pruned(name, tmp_path):
    torch.manual_seed(0)
    folder = saved(SEEING[name](), tmp_path / "model")
    assert set(answers(folder, tmp_path).values()) == {""}
    config = load_config(folder)
    assert ModelSizes(config).savings([0, 1, 3])["layers"] == {"before": 4, "after": 3}
    report = prune_checkpoint(folder, tmp_path / "pruned", PruningPlan.from_keep(4, [0, 1, 3]))
    assert report.passed
    pruned = load_structure(tmp_path / "pruned")
    assert LayeredModel(pruned).num_layers == 3


def test_a_decoder_without_a_class_of_its_own_is_sized_as_it_is(tmp_path):
    model = qwen3_vl()
    view = LayeredModel(model)
    built = build_on_meta(model.config)
    whole = view.model.get_submodule("model.language_model")
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    assert count_parameters(built) == count_parameters(whole) + (0 if tied else head.numel())


# -- layers behind the last one ----------------------------------------------------------------------------


def with_predictor(folder, layer, prefix="model."):
    """Adds a layer that predicts the token after next, as GLM-4.5 and DeepSeek-V3 store it."""

    def change(tensors):
        for name in [n for n in tensors if n.startswith(f"{prefix}layers.{layer - 1}.")]:
            copy = tensors[name].clone()
            tensors[name.replace(f"layers.{layer - 1}.", f"layers.{layer}.")] = copy
        tensors[f"{prefix}layers.{layer}.eh_proj.weight"] = torch.zeros(32, 64)

    return rewrite(folder, change)


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "num_mtp_layers", None])
@pytest.mark.parametrize("kind", ["glm4_moe", "llama"])
def test_layers_for_predicting_several_tokens_are_left_behind(tmp_path, kind, field):
    if kind == "llama":
        model = make_llama(hidden_size=32)
    else:
        model = T.Glm4MoeForCausalLM(T.Glm4MoeConfig(**{**TEXT, **MIXED}))
    folder = with_predictor(saved(model, tmp_path / "model"), 4)
    if field:
        edit(folder, **{field: 1})
    assert set(answers(folder, tmp_path).values()) == {""}
    blueprint = Blueprint(folder, PruningPlan.from_keep(4, [0, 1, 3]))
    names = [piece.name for piece in blueprint.pieces()]
    assert "predicting several tokens" in blueprint.warnings[0]
    assert not [name for name in names if "layers.3." in name or "layers.4." in name or "eh_proj" in name]
    if field:
        assert blueprint.new_config()[field] == 0
    prune_checkpoint(folder, tmp_path / "pruned", PruningPlan.from_keep(4, [0, 1, 3]))


def test_a_predictor_outside_the_layers_is_left_behind(tmp_path):
    folder = edit(saved(make_llama(), tmp_path / "model"), mtp_num_hidden_layers=1)
    rewrite(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.zeros(16, 32)}))
    blueprint = Blueprint(folder, PruningPlan.from_keep(4, [0, 1, 3]))
    assert "mtp.fc.weight" not in [piece.name for piece in blueprint.pieces()]
    assert beyond_fields(load_config(folder)) == {"mtp_num_hidden_layers": 1}


def test_more_layers_than_the_config_counts_are_still_refused(llama, tmp_path):
    def add(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.3.")]:
            tensors[name.replace("layers.3.", "layers.4.")] = tensors[name].clone()

    rewrite(llama, add)
    said = answers(llama, tmp_path)
    assert all("layers.4" in text or "layer 4" in text for text in said.values()), said


# -- null, quantisation, code ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["quantization_config", "architectures", "torch_dtype", "attn_implementation",
             "_attn_implementation_internal", "num_nextn_predict_layers", "rope_scaling",
             "compression_config"]
)  # fmt: skip
def test_null_says_nothing(llama, tmp_path, name):
    edit(llama, **{name: None})
    assert set(answers(llama, tmp_path).values()) == {""}
    blueprint = Blueprint(llama, PruningPlan.from_keep(4, [0, 1, 3]))
    assert not blueprint.quantised
    assert blueprint.new_config().get("quantization_config", "none") == "none"


def test_null_rotary_fields_are_filled_for_older_readers(llama):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    edit(llama, rope_parameters=rope, rope_scaling=None, rope_theta=None)
    patched = Blueprint(llama, PruningPlan.from_keep(4, [0, 1, 3])).new_config()
    assert patched["rope_theta"] == 5000.0
    assert patched["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"inner": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_quantised_anywhere_in_the_config(llama, changes):
    edit(llama, **changes)
    for action in (check_loadable, find_subject, load_model):
        with pytest.raises(ModelError, match=r"is quantised \((gptq|compressed-tensors|4 bit|awq)\)"):
            action(llama)
    assert Blueprint(llama, PruningPlan.from_keep(4, [0, 1, 3])).quantised


def test_quantised_by_its_tensors_or_by_a_file_beside_them(llama):
    (llama / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"quantised \(see hf_quant_config\.json\)"):
        check_loadable(llama)
    (llama / "hf_quant_config.json").unlink()
    name = "model.layers.0.self_attn.q_proj.qweight"
    rewrite(llama, lambda t: t.update({name: torch.zeros(2, 2, dtype=torch.int32)}))
    with pytest.raises(ModelError, match=r"it has the tensor .*qweight"):
        check_model_folder(llama)


def test_quantised_sections_are_renumbered_wherever_they_are(llama):
    section = {"quant_method": "awq", "modules_to_not_convert": ["model.layers.2.mlp", "model.layers.3.mlp"]}
    edit(llama, inner={"quantization_config": section})
    patched = Blueprint(llama, PruningPlan.from_keep(4, [0, 1, 3])).new_config()
    assert quantised_parts(patched)["inner.quantization_config"]["modules_to_not_convert"] == [
        "model.layers.2.mlp"
    ]


def test_auto_map_matters_only_for_types_transformers_does_not_know(llama, tmp_path):
    edit(llama, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert set(answers(llama, tmp_path).values()) == {""}
    edit(llama, model_type="newllm")
    with pytest.raises(ModelError, match=r"asks for remote code \(auto_map\).*'newllm'.*--trust-remote-code"):
        check_loadable(llama)


@pytest.mark.parametrize(
    "name", ["stranger/kernel", "kernels-community/flash-attn2@main:f", "sonic", "a|sdpa"]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_kernels_a_config_names_are_refused_by_every_command(llama, tmp_path, key, name, nested):
    edit(llama, **({"text_config": {key: {"": name}}} if nested else {key: name}))
    for text in answers(llama, tmp_path).values():
        assert "fetch and run code" in text and "Allowed are eager" in text and key in text
    with pytest.raises(IntegrityError):
        load_structure(llama)


def test_other_ways_to_name_a_kernel(llama):
    for changes in ({"kernel_config": {"RMSNorm": "org/repo:RMSNorm"}}, {"hub_kernels": ["org/repo"]}):
        original = (llama / "config.json").read_text()
        edit(llama, **changes)
        with pytest.raises(IntegrityError, match="fetch and run code"):
            load_config(llama)
        (llama / "config.json").write_text(original)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flash_attention_3"])
def test_attention_that_comes_with_the_libraries_is_allowed_and_flash_is_not_fetched(llama, name):
    edit(llama, attn_implementation=name)
    load_model(llama, device="cpu")
    asked = load_config(llama)._attn_implementation
    assert asked == (None if name.startswith("flash") else name)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("num_hidden_layers", 10**9, "2,000"), ("num_hidden_layers", 1e9, "2,000"),
        ("num_hidden_layers", 0, "at least 1"), ("num_attention_heads", 10**12, "65,536"),
        ("num_local_experts", 10**8, "65,536"), ("hidden_size", 10**15, "268,435,456"),
        ("vocab_size", 2**70, "268,435,456"), ("max_position_embeddings", 10**30, "1,099,511,627,776"),
        ("text_config", {"num_hidden_layers": 10**9}, "2,000"), ("num_hidden_layers", float("inf"), "2,000"),
    ],
)  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_built(llama, tmp_path, key, value, allowed, monkeypatch):
    edit(llama, **{key: value})
    monkeypatch.setattr(
        T.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("transformers was asked")
    )
    for text in answers(llama, tmp_path).values():
        assert key in text and allowed in text


# -- folders of other things -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_folder_is_to_be_merged_first(tmp_path, llama, with_config, call):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    get_peft_model(make_llama(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)
    if with_config:
        (folder / "config.json").write_text((llama / "config.json").read_text())
    for text in answers(folder, tmp_path).values():
        assert "holds a PEFT adapter" in text and "Merge it first" in text and "merge_and_unload" in text
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    for command in (
        ("evaluate", folder, "--eval-data", rows),
        ("prune", folder, tmp_path / "pruned", "--drop", "2"),
        (
            "run",
            "--model",
            folder,
            "--data",
            rows,
            "--eval-data",
            rows,
            "--out",
            tmp_path / "run",
            "--dry-run",
        ),
        ("cost", folder, "--num-prune", "1", "--dry-run"),
    ):
        code, _, said = call(*command)
        assert code == 4 and "adapter" in said and "Merge it first" in said


def test_adapters_beside_weights(llama, tmp_path):
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    for text in answers(llama, tmp_path).values():
        assert "adapters for 'some/base' beside its weights" in text and "adapter_config.json" in text


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (T.LlamaForSequenceClassification, "a classifier"),
        (T.LlamaForTokenClassification, "a classifier of tokens"),
        (T.LlamaModel, "without a language head"),
    ],
)
def test_models_without_a_language_head(tmp_path, model, what):
    folder = saved(model(make_llama().config), tmp_path / "model")
    for text in answers(folder, tmp_path).values():
        assert what in text and model.__name__ in text and "give the model this one was made from" in text


def test_encoders_and_embedding_models(tmp_path, llama):
    bert = T.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=4, num_attention_heads=2
    )
    folder = saved(T.BertForMaskedLM(bert), tmp_path / "bert")
    assert all("an encoder" in text for text in answers(folder, tmp_path).values())
    t5 = T.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2)
    folder = saved(T.T5ForConditionalGeneration(t5), tmp_path / "t5")
    assert all("an encoder with a decoder" in text for text in answers(folder, tmp_path).values())
    (llama / "modules.json").write_text("[]")
    (llama / "config_sentence_transformers.json").write_text("{}")
    with pytest.raises(ModelError, match="embedding model"):
        check_loadable(llama)


def test_gguf_and_old_weights(tmp_path, llama):
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for text in answers(gguf, tmp_path).values():
        assert "model-Q4_K_M.gguf" in text and "Use the Hugging Face folder" in text
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    for text in answers(llama, tmp_path).values():
        assert "pytorch_model.bin" in text and "save_pretrained" in text
    assert is_model_folder(gguf) and is_model_folder(llama) and not is_model_folder(tmp_path)


# -- the dry run checks what the run checks ----------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "shape", "left over"])
def test_dry_runs_look_at_the_tensors(llama, tmp_path, call, fault):
    name = "model.layers.1.mlp.up_proj.weight"
    changes = {
        "missing": lambda tensors: tensors.pop(name),
        "shape": lambda tensors: tensors.update({name: torch.zeros(3, 3)}),
        "left over": lambda tensors: tensors.update({name.replace("up_proj", "extra"): torch.zeros(1)}),
    }
    rewrite(llama, changes[fault])
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(12))
    data = ("--data", rows, "--eval-data", rows, "--out", tmp_path / "run")
    for command in (
        ("run", "--model", llama, *data, "--set", "plan.num_prune=1"),
        ("compare", "--model", llama, *data, "--methods", "last"),
        ("shrink", llama, *data),
        ("evaluate", llama, "--eval-data", rows),
        ("prune", llama, tmp_path / "pruned", "--drop", "2"),
    ):
        code, _, said = call(*command, "--dry-run")
        part = "mlp.extra" if fault == "left over" else "mlp.up_proj"
        assert code == 6 and part in said, (command[0], code, said)
    assert not (tmp_path / "run").exists()


# -- precision and size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, "float32", "float16"])
def test_the_stored_dtype_is_that_of_the_tensors(tmp_path, named):
    folder = saved(make_llama().to(torch.bfloat16), tmp_path / "model")
    edit(folder, dtype=named, torch_dtype=named)
    assert stored_dtype(folder) == torch.bfloat16
    assert load_config(folder).dtype == torch.bfloat16
    saved_bytes = ModelSizes(load_config(folder)).savings([0, 1, 3])["disk_bytes"]["before"]
    assert saved_bytes == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


def test_the_config_is_asked_only_where_no_tensor_is_a_plain_float(tmp_path):
    folder = saved(make_llama(), tmp_path / "model")
    rewrite(folder, lambda t: t.update({n: w.to(torch.float8_e4m3fn) for n, w in t.items()}))
    edit(folder, dtype=None, text_config={"torch_dtype": "float16"})
    assert stored_dtype(folder) == torch.float16
    edit(folder, text_config={})
    assert stored_dtype(folder) == torch.float32


@pytest.mark.parametrize("kind", list(SEEING))
def test_a_saved_model_that_also_sees_is_as_large_as_its_source(tmp_path, kind):
    torch.manual_seed(0)
    folder = saved(SEEING[kind]().to(torch.bfloat16), tmp_path / "model")
    edit(folder, dtype=None, text_config__dtype="bfloat16")
    model = load_model(folder, dtype="float32", device="cpu")
    options = {"dtype": stored_dtype(folder), "plan": None, "source": "x", "like": folder}
    out = save_model(model, None, tmp_path / "out", **options)
    before, after = (load_file(where / "model.safetensors") for where in (folder, out))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert sum(t.nbytes for t in after.values()) <= sum(t.nbytes for t in before.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_every_parameter_keeps_its_own_dtype(tmp_path):
    folder = saved(make_llama(), tmp_path / "model")

    def mix(tensors):  # most entries in float32, so that one dtype for all would double the layers
        for name in tensors:
            if "mlp" in name and "norm" not in name:
                tensors[name] = tensors[name].to(torch.bfloat16)
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].float()

    rewrite(folder, mix)
    model = load_model(folder, dtype="float32", device="cpu")
    cast_like(model, folder, torch.float32)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == torch.float32
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert kinds["model.layers.2.mlp.up_proj.weight"] == torch.bfloat16  # the narrowest of its kind


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("architectures", 5, "it must be a list of class names"),
        ("architectures", ["LlamaForCausalLM", None], "it must be a list of class names"),
        ("text_config", {"x": 1}, "holds a text_config that models of type 'llama' do not have"),
    ],
)
def test_fields_of_another_kind_are_refused_by_name(tmp_path, field, value, said):
    make_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ModelError, match=said):
        load_config(tmp_path, native=True)
