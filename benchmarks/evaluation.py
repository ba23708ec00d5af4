"""Speed of evaluation compared with lm-evaluation-harness's Hugging Face backend, and whether results agree.

    python benchmarks/evaluation.py --model MODEL --data DATA    writes benchmarks/results/evaluation.json

DATA holds arc_easy/test.jsonl. The harness is timed from finished requests to scores; ours is timed as a
whole, with tokenising and bootstrap. Both use the same loaded model, batch size and threads, and take turns.
Multiple choice is the likelihood of the options without an end token, as in the harness, with two prompts:
this project's, which lists the options, and the harness's, which does not. Generation is 64 greedy tokens.
"ours, prompts not shared" computes the prompt once per option.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULT = Path(__file__).parent / "results" / "evaluation.json"
SEED, NEW_TOKENS = 0, 64


def harness_requests(examples: list[Any], kind: str) -> list[Any]:
    from lm_eval.api.instance import Instance

    if kind == "generate_until":
        options = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
        return [Instance(kind, {}, (e.prompt, dict(options)), 0) for e in examples]
    return [
        Instance(kind, {"id": e.id}, (e.prompt, choice), k)
        for e in examples
        for k, choice in enumerate(e.choices)
    ]


class Contest:
    """Both evaluations on one model, which is loaded once."""

    def __init__(self, path: str, batch_size: int) -> None:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        self.batch_size = batch_size
        self.harness = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size)

    def our_choices(self, examples: list[Any]) -> list[list[float]]:
        from gradpruner.evaluation.quality import evaluate

        found = evaluate(
            self.model, self.tokenizer, examples, metrics=["choice_likelihood"],
            batch_size=self.batch_size, score_ends=False,
        )  # fmt: skip
        return [list(o.choice_scores or ()) for o in found.outputs]

    def our_choices_alone(self, examples: list[Any]) -> list[list[float]]:
        from gradpruner.evaluation.likelihood import OptionScorer
        from gradpruner.evaluation.questions import Questions

        questions = Questions(self.tokenizer, examples, 2048, score_ends=False)
        scorer = OptionScorer(self.model, 0, self.batch_size)
        scorer.shares_prompts = False
        found: dict[int, list[float]] = {}
        for batch, scores in scorer.score([questions.option_set(i) for i in range(len(examples))]):
            found |= dict(zip(batch, scores, strict=True))
        return [found[i] for i in range(len(examples))]

    def their_choices(self, examples: list[Any]) -> list[list[float]]:
        requests = harness_requests(examples, "loglikelihood")
        values = iter([score for score, _ in self.harness.loglikelihood(requests, disable_tqdm=True)])
        return [[next(values) for _ in e.choices] for e in examples]

    def our_texts(self, examples: list[Any]) -> list[str]:
        from gradpruner.evaluation.quality import evaluate

        found = evaluate(
            self.model, self.tokenizer, examples, metrics=["exact_match"], batch_size=self.batch_size,
            max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        return [str(o.generated).strip() for o in found.outputs]

    def their_texts(self, examples: list[Any]) -> list[str]:
        requests = harness_requests(examples, "generate_until")
        return [text.strip() for text in self.harness.generate_until(requests, disable_tqdm=True)]


def timed(work: Any, examples: list[Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work(examples)
    return time.perf_counter() - started, found


def compare(works: dict[str, Any], examples: list[Any], rounds: int) -> dict[str, Any]:
    """Times all works in turns; speedups are relative to "lm_eval"."""
    for work in works.values():
        work(examples[:8])  # warm-up
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken, found[name] = timed(work, examples)
            seconds[name].append(taken)
    theirs = seconds["lm_eval"]
    return {
        "examples": len(examples),
        "examples_per_second": {n: len(examples) / statistics.median(v) for n, v in seconds.items()},
        "speedup": {
            name: statistics.median(t / own for t, own in zip(theirs, values, strict=True))
            for name, values in seconds.items()
            if name != "lm_eval"
        },
        "raw_seconds": seconds,
        "found": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--generated", type=int, default=64, help="rows to generate for")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()

    from torch import get_num_threads

    from gradpruner.common.progress import set_mode
    from gradpruner.common.provenance import provenance
    from gradpruner.data.tasks import load_task

    set_mode("quiet")
    contest = Contest(args.model, args.batch_size)
    listed = list(load_task("arc_easy", args.data / "arc_easy", "test", args.rows, SEED).examples)
    bare = [replace(e, prompt=e.prompt.partition("\nOptions:")[0] + "\nAnswer:") for e in listed]
    cases: dict[str, Any] = {}
    for name, examples in (("options listed in the prompt", listed), ("the harness's prompt", bare)):
        works = {"ours": contest.our_choices, "lm_eval": contest.their_choices}
        works["ours, prompts not shared"] = contest.our_choices_alone
        case = cases[name] = compare(works, examples, args.rounds)
        mine, theirs = (case["found"][who] for who in ("ours", "lm_eval"))
        pairs = list(zip(mine, theirs, strict=True))
        same = sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs)
        case["same_choice"] = [same, len(pairs)]
        case["largest_difference_nats"] = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
        del case["found"]
    texts = compare(
        {"ours": contest.our_texts, "lm_eval": contest.their_texts}, listed[: args.generated], args.rounds
    )
    same = sum(a == b for a, b in zip(texts["found"]["ours"], texts["found"]["lm_eval"], strict=True))
    texts["same_text"] = [same, texts["examples"]]
    del texts["found"]
    result = {
        "what": "evaluation speed over lm-evaluation-harness, Hugging Face backend; ratios of seconds",
        "config": {
            "model": Path(args.model).name,
            "parameters": sum(p.numel() for p in contest.model.parameters()),
            "new_tokens": NEW_TOKENS,
            "batch_size": args.batch_size,
            "rounds": args.rounds,
            "threads": get_num_threads(),
            "lm_eval": metadata.version("lm_eval"),
        },
        "goal": {"choices_speedup": 3.0},
        "choices": cases,
        "generation": texts,
        "load_average": os.getloadavg(),
        "provenance": provenance(SEED),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: case["speedup"] for name, case in [*cases.items(), ("text", texts)]}, indent=1))


if __name__ == "__main__":
    main()
