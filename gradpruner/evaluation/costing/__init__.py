"""What a pruned model saves against the dense one, measured: `gradpruner cost`.

comparison   measure_cost: both models, every figure, as JSON
subject      what is measured: a folder, a hub id or a shape; shapes: configs without weights
workload     what is run, and how often
sizing       sizes, operations and the floor that depth alone allows, without loading anything
per_device   what training holds on each device: weights, gradients, optimizer, exactly
rehearsal    activations of a training step, found without data
scaling      both for several processes, and what recording, gathering and pruning move
turns        the two models run in turns, one process a model and mode
worker       what such a process does
figures      every figure of both models, beside its floor
"""
