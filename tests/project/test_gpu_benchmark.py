"""`benchmarks/gpu`: every part with tiny models, resuming, and the tables made from the journal."""

import argparse
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from processes import RUN_PATH, ended
from stand_ins import FakeProcess

from gradpruner.evaluation.costing import turns
from gradpruner.models.loading import load_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "measure.py"
NAMES = ("journal", "parts", "place", "pairs", "linears", "whole", "measure")


@pytest.fixture(scope="module")
def gpu():
    """The benchmark's modules, which are scripts in one folder and not a package."""
    folders = [str(ROOT / "benchmarks" / "gpu"), str(ROOT / "docs")]
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path[:0] = folders
    try:
        import gpu_blocks
        import measure
        import whole

        yield types.SimpleNamespace(measure=measure, whole=whole, blocks=gpu_blocks)
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def arguments(tmp_path, **changes):
    usual = {"device": "cpu", "tiny": True, "results": tmp_path, "model": None, "data": None, "only": []}
    return argparse.Namespace(**usual | changes)


def test_as_a_user_calls_it(tmp_path):
    command = ["--tiny", "--device", "cpu", "--results", tmp_path, "--only", "device", "serving"]
    code, said, errors = ended(RUN_PATH, SCRIPT, *command)
    assert code == 0, errors
    assert "measured  device" in said and "skipped   serving: not installed: vllm" in said
    (first, second) = map(json.loads, (tmp_path / "cpu-tiny.jsonl").read_text().splitlines())
    assert (first["part"], first["outcome"]) == ("serving", "skipped")
    assert second["bytes_per_second"] > 0 and second["provenance"]["packages"]["torch"] == torch.__version__
    code, _, errors = ended(RUN_PATH, SCRIPT, "--device", "cpu")
    assert code == 2 and "--tiny" in errors


class Engine:
    """Stands in for vLLM, with transformers inside; one answer in four is changed."""

    def __init__(self, *, model, dtype, **_):
        self.model = load_model(model, dtype=dtype, device="cpu")
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts, greedy):
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            new = self.model.generate(ids, do_sample=False, max_new_tokens=greedy.max_tokens, pad_token_id=0)
            outputs.append(new[0, ids.shape[1] :].tolist())
        outputs[0][0] += 1
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=one)]) for one in outputs]


def test_every_part_runs_and_the_tables_show_it(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeProcess, "order", [])
    monkeypatch.setattr(turns, "Popen", FakeProcess)
    sampling = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=sampling))

    def study(command, check):
        folder = Path(command[command.index("--results") + 1])
        folder.mkdir()
        cells = {"dense/1e-4": 0.8, "dense/2e-4": 0.9, "shrink/igia/12/influence": 0.6}
        lines = [
            {"key": f"trec/0/{cell}", "task": "trec", "seed": 0, "cell": cell, "test": {"score": score}}
            | {"validation": {"nll": 1 if cell == "dense/1e-4" else 2}}
            for cell, score in cells.items()
        ]
        (folder / "trec.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(gpu.whole, "subprocess", types.SimpleNamespace(run=study))
    args = arguments(tmp_path, model=tmp_path, data=tmp_path)
    monkeypatch.setattr(gpu.measure, "why_not", lambda part, *_: "" if part.tiny else "no miniature")

    def here(command, out, seconds):
        name = command[command.index("--part") + 1]
        if name == "look":
            return {"missing": [], "provenance": {}, "device": "cpu"}
        given = arguments(tmp_path, data=tmp_path, model=tmp_path if name == "quality" else None)
        return gpu.measure.work(name, given, tmp_path / "cpu-tiny.jsonl")

    monkeypatch.setattr(gpu.measure, "in_process", here)
    assert gpu.measure.go(args, float("inf")) == 0
    lines = gpu.measure.Journal(tmp_path / "cpu-tiny.jsonl").lines()
    assert {part.name for part in gpu.measure.PARTS} == set(lines)
    wrong = {name: line for name, line in lines.items() if line["outcome"] != "measured"}
    assert set(wrong) == {"liger", "flash_attention"}, wrong
    assert lines["table/llama-3.1-8b/full"]["device_floor_seconds"][0]["step_seconds"] > 0
    assert lines["recording"]["step_seconds"]["ratio"] == 1 and lines["job"]["layers"] == 4
    assert lines["serving"]["same_answers"] == 3
    linears = lines["linears"]
    assert linears["scoring"]["largest_relative_error"] < 1e-6
    assert linears["merging"]["entries_that_differ"] == 0
    assert linears["repair"]["error_after"] < 0.8 * linears["repair"]["error_before"]
    text = gpu.blocks.gpu(tmp_path)
    assert text.count("not measured") == 2 and "not measured (no miniature)" in text
    assert "75.0 % of the dense score, 1 run" in text and "3 of 4 answers" in text
    assert "| Llama-3.1-8B | LoRA, a step | 2.00 s | 1.00 s | 0.500 (0.500 to 0.500) |" in text


def test_it_resumes_and_ends_in_time(gpu, tmp_path, monkeypatch):
    answers = {
        "device": {"error": "RuntimeError: driver"},
        "table/llama-3.1-8b/lora": {"error": "dense: OutOfMemoryError: CUDA out of memory."},
        "table/llama-3.1-8b/inference": {"error": "not done after 9 s", "outcome": "out of time"},
        "table/llama-3.1-8b/full": {"figures": []},
    }
    begun = []

    def play(command, out, seconds):
        name = command[command.index("--part") + 1]
        if name == "look":
            return {"missing": [], "provenance": {}, "device": "NVIDIA H100 80GB HBM3"}
        begun.append(name)
        return answers[name]

    monkeypatch.setattr(gpu.measure, "in_process", play)
    args = arguments(tmp_path, only=["device", "table/llama"])
    gpu.measure.go(args, float("inf"))
    journal = gpu.measure.Journal(tmp_path / "nvidia-h100-80gb-hbm3-tiny.jsonl")
    assert [journal.outcome(name) for name in answers] == [
        "failed",
        "does not fit",
        "out of time",
        "measured",
    ]
    with journal.path.open("a") as file:
        file.write('{"part": "device", "outc')  # a kill cut this line short
    assert journal.outcome("device") == "failed"
    begun.clear()
    answers["device"] = {"bytes_per_second": 1.0}
    gpu.measure.go(args, float("inf"))
    assert begun == ["device", "table/llama-3.1-8b/inference"] and journal.outcome("device") == "measured"
    begun.clear()
    args.tiny = False
    gpu.measure.go(args, gpu.measure.time.monotonic() + 59)  # time for the part of 20 seconds only
    assert begun == ["device"]
