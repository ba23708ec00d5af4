"""Plans: what will happen to a model, decided before any weight changes. Pure torch.

options        PlanOptions: how many layers are pruned, protected and merged
base           what both kinds of plan share: a checked JSON file, a method, evidence
layer_plan     PruningPlan: keep, drop or merge, for every layer
width_plan     WidthPlan: which heads, channels and hidden dimensions stay
reading        reads a plan of either kind from a file
selection      chooses the layers to prune, by score and by what the model's shape allows
merging        combines the linears of merged layers
repair         Repair: the refitted weights that belong to a plan
"""
