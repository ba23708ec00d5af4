"""What `make run` gives: the embedded demo, start to end.

python benchmarks/demo_run.py            runs it and writes benchmarks/results/demo_run.json
python benchmarks/demo_run.py runs/demo  takes the record of a run that is already there
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from gradpruner.reports import markdown_table
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe import load_recipe

RESULT = Path(__file__).parent / "results" / "demo_run.json"
RECIPE = Path(__file__).parents[1] / "gradpruner" / "recipes" / "demo.yaml"


def main() -> None:
    if len(sys.argv) > 1:
        record: dict[str, Any] = json.loads((Path(sys.argv[1]) / "run.json").read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            record = run(load_recipe(RECIPE, values={"out": folder}))
    result = {
        "what": "the embedded demo, as `make run` carries it out",
        "table": markdown_table(record).partition("\n\n")[0] + "\n",
        "seconds": round(sum(stage["seconds"] or 0 for stage in record["stages"]), 1),
        "provenance": record["provenance"],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result["table"])


if __name__ == "__main__":
    main()
