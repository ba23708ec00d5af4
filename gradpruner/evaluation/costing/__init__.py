"""What a pruned model saves against the dense one, measured: `gradpruner cost`.

comparison   measure_cost: both models, every figure, as JSON
subject      what is measured: a folder, a hub id or a shape; shapes: configs without weights
workload     what is run, and how often
sizing       sizes, operations and the floor that depth alone allows, without loading anything
turns        the two models run in turns, one process a model and mode
worker       what such a process does
figures      every figure of both models, beside its floor
"""
