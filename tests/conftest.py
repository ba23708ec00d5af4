"""Shared by all tests: one thread, no network, and models small enough to be made in memory."""

import gc
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from gradpruner.common.progress import set_mode
from gradpruner.gradients.trace import GradientTrace, LinearRef, TraceInfo
from gradpruner.gradients.trace_writer import TraceWriter
from gradpruner.models.layers import LayeredModel, fingerprint

torch.set_num_threads(1)
# Imports leave 700,000 objects that never go; looking through them was more than half of the suite's time.
gc.disable()

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
# Every supported family, with what makes its layers differ from one another.
FAMILY_OPTIONS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": WINDOWED,
    "qwen3": {**WINDOWED, "head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 3},
}


def pytest_collection_modifyitems(items):
    """Tests that take long begin first, so that no worker waits for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """From here on only what the tests make is looked through for garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def rehearsed_once():
    """Dry runs of equal models find what a training step holds once: a second of the two that they take."""
    from gradpruner.runs.before import fitting

    found, rehearse = {}, fitting.working_bytes

    def working_bytes(model, training, layers):
        key = model.config.to_json_string(use_diff=False), training, layers
        if key not in found:
            found[key] = rehearse(model, training, layers)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "working_bytes", working_bytes)
        yield


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """Tests of runs draw all figures but do not write them out: a sixth of their time."""
    if request.path.parent.name == "runs":
        blank = '<svg viewBox="0 0 1 1"></svg>'
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(blank))


@pytest.fixture(autouse=True)
def process_as_usual():
    """No test finds progress lines turned off, or signals handled, by an earlier one.

    Signals may also be ignored, where the tests run in the background of a shell.
    """
    set_mode("auto")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def quiet(process_as_usual):
    """No progress lines."""
    set_mode("quiet")


def make_model(model_type="llama", seed=0, **options):
    """A random causal LM of one family in evaluation mode, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**COMMON, **FAMILY_OPTIONS[model_type], **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases of a fresh model are all 1 or 0
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_trace(model, steps=4, rank=2, seed=0, folder=None, scale=1.0, keep_factors=True) -> GradientTrace:
    """Random factors for every linear of a model, and gates; as in life, the first step has no factor A."""
    view = LayeredModel(model)
    linears = [
        LinearRef(layer, name, *weight.shape, rank)
        for layer in range(view.num_layers)
        for name, weight in view.weights(layer).items()
    ]
    generator = torch.Generator().manual_seed(seed)
    gates = torch.Generator().manual_seed(seed)
    writer = TraceWriter(linears, Path(folder) if folder else None, keep_factors)
    for step in range(steps):
        grad_b = [torch.randn(ref.out_features, rank, generator=generator) * scale for ref in linears]
        grad_a = [
            torch.randn(rank, ref.in_features, generator=generator) * scale * (step > 0) for ref in linears
        ]
        gates_EL = torch.randn(3, view.num_layers, generator=gates, dtype=torch.float64)
        assert writer.add_step(grad_b, grad_a, gates_EL) is None
    return writer.finish(TraceInfo(view.num_layers, tuple(linears), model=fingerprint(model)))


@pytest.fixture
def tiny_model():
    """Factory: `tiny_model("qwen2", seed=1)`."""
    return make_model


@pytest.fixture
def tiny_llama():
    """Factory of six-layer Llamas: `tiny_llama(seed=1)`."""
    return make_model


@pytest.fixture
def tiny_trace():
    """Factory: `tiny_trace(model, steps=4, folder=None)`."""
    return make_trace


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs the command line in this process; returns exit code, standard output and standard error."""
    from gradpruner.cli import main as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradpruner", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(params=sorted(FAMILY_OPTIONS))
def family_name(request):
    """Every supported family in turn."""
    return request.param
