"""Checks that DeepSpeed ZeRO 1, 2 and 3 in two CPU processes give the losses, weights and answers of one.

    pip install deepspeed          # no extra of ours brings it
    DS_BUILD_OPS=0 python benchmarks/deepspeed_two.py

Prints one line per check and exits with 1 if a check failed. DeepSpeed communicates through gloo here; its
shared-memory collectives for CPUs, which it would have to compile, are switched off.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

START = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""
TUNING = (
    START
    + """
import json
import test_together

found, (stage, config, folder) = {}, sys.argv[1:]
found["full"] = test_together.tuned(4, deepspeed=config)
found["lora"] = test_together.tuned(4, "lora", deepspeed=config)
found["teacher"] = test_together.taught(4, deepspeed=config)
found["resumed"] = test_together.resumed(4, folder, deepspeed=config)
found["record"] = test_together.recorded(2)  # data parallel again
print("found", json.dumps(found))
"""
)
COMMAND = (
    START
    + """
from gradpruner.cli.main import main

sys.argv[0] = "gradpruner"
main()
"""
)


def config_of(stage: int, folder: Path) -> Path:
    """Writes the example's configuration, changed so that small weights are sharded too."""
    path = REPOSITORY / f"examples/deepspeed_zero{max(stage, 2)}.json"
    config = json.loads(path.read_text())
    config["zero_optimization"] |= {"stage": stage}
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    written = folder / f"zero{stage}.json"
    written.write_text(json.dumps(config))
    return written


def furthest(found: Any, expected: Any) -> float:
    """Returns the largest relative difference between two lists or mappings of numbers."""
    if isinstance(expected, dict):
        found, expected = [found[name] for name in expected], list(expected.values())
    assert len(found) == len(expected)
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def tunings(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yields the checks of fine-tuning and recording: name, difference found, difference allowed."""
    from test_together import recorded, taught, tuned
    from together import together

    alone = {"full": tuned(8), "lora": tuned(8, "lora"), "teacher": taught(8), "record": recorded(4)}
    alone["resumed"] = alone["full"]
    for stage in (1, 2, 3):
        said = together(TUNING, stage, config_of(stage, folder), folder / f"checkpoints{stage}")
        found = json.loads(said[0].split("found ")[1])
        yield f"ZeRO {stage}: resumed from step 2", abs(found["resumed"]["from"] - 2), 0
        for what, expected in alone.items():
            yield f"ZeRO {stage}: losses, {what}", furthest(found[what]["losses"], expected["losses"]), 1e-4
            if what != "record":
                off = furthest(found[what]["weights"], expected["weights"])
                yield f"ZeRO {stage}: weights, {what}", off, 1e-5


def whole_run(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yields the checks of a whole run under ZeRO 3: tune, record, prune, repair, recover, evaluate."""
    from builders import make_project
    from together import together
    from transformers import AutoModelForCausalLM

    from gradpruner.pruning.verification import verify_checkpoint
    from gradpruner.runs.pipeline import run
    from gradpruner.runs.recipe.recipe import load_recipe

    recipes = [
        make_project(
            folder / str(size),
            start="tuned",
            variants=["dense", "dropped"],
            plan={"repair": "linear", "num_merge": 0},
            record={"steps": 4, "batch_size": 4 // size, "dropout": 0.0},
            finetune={"batch_size": 4 // size, "accumulation": 1, "epochs": 1}
            | ({"deepspeed": str(config_of(3, folder))} if size == 2 else {}),
            recover={"steps": 3},
        )
        for size in (1, 2)
    ]
    run(load_recipe(recipes[0][0]))
    together(COMMAND, "run", recipes[1][0])
    one, two = (Path(values["out"]) for _, values in recipes)
    for row in ("dense", "dropped"):
        models = [AutoModelForCausalLM.from_pretrained(out / f"variants/{row}/model") for out in (one, two)]
        norms = [{n: p.double().norm().item() for n, p in model.named_parameters()} for model in models]
        yield f"run: saved weights, {row}", furthest(norms[1], norms[0]), 1e-5
        texts = [(out / f"variants/{row}/examples.jsonl").read_text() for out in (one, two)]
        yield f"run: answers, {row}", float(texts[0] != texts[1]), 0
    yield "run: verify", float(not verify_checkpoint(two / "variants/dropped/pruned").passed), 0


def main() -> int:
    """Runs all checks; returns the exit code."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for checks in (tunings, whole_run):
            for what, off, allowed in checks(Path(name)):
                failed += off > allowed
                print(
                    f"{'ok' if off <= allowed else 'FAILED':7} {what}: {off:.1e} (allowed {allowed:g})",
                    flush=True,
                )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
