"""The results of a bundled recipe, from start to end, as the README shows them.

python benchmarks/recipe_run.py demo                      runs it and writes benchmarks/results/demo_run.json
python benchmarks/recipe_run.py demo --record runs/demo   uses the record of a finished run
python benchmarks/recipe_run.py smollm2 --set model.path=./SmolLM2 --set data.folder=./banking77
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from gradpruner.reports.markdown import markdown_table
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parents[1] / "gradpruner" / "recipes"
WHAT = {
    "demo": "the embedded demo, as `make run` carries it out",
    "smollm2": "SmolLM2-135M-Instruct on Banking77, as `gradpruner run smollm2` carries it out",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=list(WHAT))
    parser.add_argument("--record", type=Path, help="a finished run directory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--busy", action="store_true", help="say that other work ran beside it, so its times are too long"
    )
    args = parser.parse_args()
    if args.record is not None:
        record: dict[str, Any] = json.loads((args.record / "run.json").read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            record = run(
                load_recipe(RECIPES / f"{args.recipe}.yaml", tuple(args.set), values={"out": folder})
            )
    result = {
        "what": WHAT[args.recipe],
        "table": markdown_table(record).partition("\n\n")[0] + "\n",
        "seconds": round(sum(stage["seconds"] or 0 for stage in record["stages"]), 1),
        "busy": args.busy,
        "provenance": record["provenance"],
    }
    (RESULTS / f"{args.recipe}_run.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result["table"])


if __name__ == "__main__":
    main()
