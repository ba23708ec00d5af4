"""Fuzzes our own JSON files with random changes: plans, scores, traces, repairs, manifests, records.

    python benchmarks/fuzz_files.py --rounds 100 --seed 1

A round runs the attacks of tests/common/test_hostile_files.py with another seed: about ten thousand files.
Each must be read as something valid or refused with a message of one line; the script stops at the first
that is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    """Runs the rounds."""
    import test_hostile_files as hostile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.perf_counter()
    for number in range(options.seed, options.seed + options.rounds):
        for check in hostile.ATTACKS:
            with tempfile.TemporaryDirectory() as place:
                check(Path(place), seed=number)
        print(f"seed {number}: nothing but our errors, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
