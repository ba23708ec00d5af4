"""From gradients that a trainer recorded to a plan: python plan_trace.py TRACE PLAN.json [LAYERS]

LAYERS is how many layers go; 40 % of them without it.
Then: gradpruner prune MODEL NEW --plan PLAN.json --trace TRACE
"""

import sys

from gradpruner import GradientTrace, plan_pruning, score_layers

trace, path, *layers = sys.argv[1:]
plan = plan_pruning(score_layers(GradientTrace.load(trace)), num_prune=int(layers[0]) if layers else None)
plan.save(path)
print(f"{path}: layers {', '.join(map(str, plan.pruned))} go.")
