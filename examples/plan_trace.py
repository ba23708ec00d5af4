"""Makes a plan from gradients that a trainer recorded: python plan_trace.py TRACE PLAN.json

Then prune by it: gradpruner prune MODEL NEW --plan PLAN.json --trace TRACE
"""

import argparse
import sys

from gradpruner import GradientTrace, GradPrunerError, plan_pruning, score_layers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("trace", help="folder of the recorded gradients")
parser.add_argument("plan", help="file to write")
parser.add_argument("--num-prune", type=int, help="layers to remove; 40 %% of them by default")
options = parser.parse_args()
try:
    plan = plan_pruning(score_layers(GradientTrace.load(options.trace)), num_prune=options.num_prune)
except GradPrunerError as error:
    sys.exit(str(error))
print(f"{plan.save(options.plan)} removes layers {', '.join(map(str, plan.pruned))}.")
