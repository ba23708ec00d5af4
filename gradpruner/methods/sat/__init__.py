"""SAT-like training.

sat     the method: steps that leave out heads and channels, fewer with every stage
sliced  a model that computes with some of its heads and channels only
"""
