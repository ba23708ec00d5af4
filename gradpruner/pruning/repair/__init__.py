"""Refits kept layers after a cut.

refitting   fit_repair: walks the dense and the pruned model and refits layer by layer
target      the linear or norm of a layer that is refitted
ridge       the regressions, from sums over tokens
tokens      the tokens they are fitted on
"""
