"""What a plan protects, merges and keeps where nothing is said: for recipes and for `plan_pruning` alike.

Importing this module imports no torch.
"""

PROTECT_FIRST = 1
"""Layers at the input never pruned, so that every merged layer has one before it."""
NUM_MERGE = 3
"""How many of the pruned layers, the best-scored, are merged instead of dropped."""
DENSITY = 0.2
"""Fraction of a merged layer's entries kept: the paper's 80 % sparsity."""
