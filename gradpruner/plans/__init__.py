"""What will happen to a model, decided before a weight is touched. Pure torch.

defaults       what is protected, merged and kept where nothing is said
base           what both kinds of plan share: a checked JSON file, a method, evidence
layer_plan     PruningPlan: keep, drop or merge, for every layer
width_plan     WidthPlan: which heads, channels and hidden dimensions stay
reading        a plan of either kind, from a file
selection      which layers go: the least important ones, of the choices that leave a model of the right shape
merging        how the linears of merged layers are combined
repair         Repair: the linears that are refitted for a plan
certification  bounds of a loss of quality, and the largest number of layers they certify
"""
