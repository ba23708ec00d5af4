"""Defaults of recipes and of `plan_pruning`.

Importing this module does not import torch.
"""

PROTECT_FIRST = 1
"""Layers at the input that are never pruned, so that every merged layer has a kept layer before it."""
NUM_MERGE = 3
"""How many of the pruned layers are merged instead of dropped: those with the highest scores."""
DENSITY = 0.2
"""Fraction of a merged layer's entries that is kept. The paper calls 0.2 "80 % sparsity"."""
