"""Parts that run a whole job: from recording to a pruned model, serving with vLLM, and the quality study."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pairs import LLAMA
from place import SEED, Place

from gradpruner.data.encoding import Collator
from gradpruner.evaluation.costing.worker import build, random_samples
from gradpruner.gradients.scores import score_layers
from gradpruner.models.layers import LayeredModel
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.pruning.repair.refitting import fit_repair

NUM_MERGE = 3
STUDY = Path(__file__).parents[1] / "quality" / "study.py"


def job(place: Place) -> dict[str, Any]:
    """Records, scores, plans, repairs, merges and prunes an 8 B shape, then generates with the result."""
    from gradpruner.training.recording import record_gradients

    workload = place.workload("lora")
    stages: dict[str, Any] = {}
    with place.stage("building", stages):
        model: Any = build(place.subject(LLAMA), "lora", workload, place.torch_device)
    samples = random_samples(model, place.workload("lora", repeats=8 if place.tiny else 32, warmup=0))
    device = "cpu" if place.torch_device.type == "cpu" else "auto"
    with tempfile.TemporaryDirectory() as folder:
        with place.stage("recording", stages):
            trace = record_gradients(
                model, samples, steps=4, batch_size=workload.batch_size, folder=Path(folder) / "trace",
                collator=Collator(), seed=SEED, device=device,
            )  # fmt: skip
        with place.stage("scoring", stages):
            scores = score_layers(trace)
        plan = plan_pruning(scores, num_prune=place.num_prune, num_merge=min(NUM_MERGE, place.num_prune - 1))
        with place.stage("repair", stages):
            repair = fit_repair(model, plan, samples, Collator(), trace=trace, rows=len(samples))
        with place.stage("pruning", stages):
            prune_(model, plan, trace, repair=repair)
    prompt = torch.tensor([samples[0]["input_ids"]], device=place.torch_device)
    with place.stage("generating", stages), torch.inference_mode():
        answer = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8
        )
        finite = bool(torch.isfinite(model(input_ids=answer).logits).all())
    layers = LayeredModel(model).num_layers
    if not finite or layers != len(plan.keep):
        raise RuntimeError(f"The pruned model has {layers} layers; its logits are finite: {finite}.")
    return {
        "stages": stages,
        "plan": plan.to_dict(),
        "repair": repair.facts(),
        "layers": layers,
        "samples": len(samples),
        "workload": asdict(workload),
    }


def serving(place: Place) -> dict[str, Any]:
    """Serves a pruned checkpoint with vLLM and compares greedy answers with transformers', in float32."""
    from vllm import LLM, SamplingParams

    from gradpruner.demo import MODEL_DIR
    from gradpruner.models.loading import load_config, load_model

    source = place.model or MODEL_DIR
    depth = int(load_config(source).num_hidden_layers)
    gone = round(0.4 * depth)
    plan = PruningPlan.from_keep(depth, [*range(depth - 1 - gone), depth - 1])
    generator = torch.Generator().manual_seed(SEED)
    new = 8 if place.tiny else 32
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pruned"
        prune_checkpoint(source, folder, plan)
        vocabulary = int(load_config(folder).vocab_size)
        prompts = torch.randint(3, vocabulary, (4 if place.tiny else 32, 24), generator=generator).tolist()
        engine = LLM(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            gpu_memory_utilization=0.3,
            max_model_len=256,
        )
        greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
        served = [list(output.outputs[0].token_ids) for output in outputs]
        del engine
        gc.collect()
        model: Any = load_model(folder, dtype="float32", device=place.device)
    ids = torch.tensor(prompts, device=place.torch_device)
    model.generation_config.eos_token_id = None  # like vLLM here, generate past end tokens
    with torch.inference_mode():
        plain = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            pad_token_id=0,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
    return {
        "model": source.name if place.model else "demo",
        "layers": [depth, len(plan.keep)],
        "answers": len(prompts),
        "same_answers": sum(one == other for one, other in zip(served, plain, strict=True)),
        "new_tokens": new,
    }


def quality(place: Place) -> dict[str, Any]:
    """Runs the study of `benchmarks/quality` on this device, for pruned models with and without repair.

    The study has its own journal, cell by cell, so that it can resume after running out of time.
    """
    assert place.model is not None and place.data is not None
    results = place.journal.with_suffix("")
    tasks = ["trec"] if place.tiny else ["trec", "banking77", "sst2"]
    seeds = ["0"] if place.tiny else ["0", "1", "2"]
    command = [
        sys.executable, str(STUDY), "tune", "shrink", "--model", str(place.model), "--data", str(place.data),
        "--scratch", str(place.scratch), "--results", str(results), "--task", *tasks, "--seed", *seeds,
        "--device", "cpu" if place.torch_device.type == "cpu" else "auto",
        "--only", "igia/12/influence", "igia/12/none",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    cells = [json.loads(line) for path in results.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {"cells": len(cells), "model": place.model.name}
