"""What a pruned model saves compared with the dense one, measured: `gradpruner cost`.

comparison   measure_cost: every figure of both models, as a table or JSON
subject      the model to measure: a folder, a hub id or a shape; shapes: configs without weights
workload     what is run, and how often
sizing       parameters, operations, and the floor set by depth alone; loads no weights
per_device   bytes of weights, gradients and optimizer that training holds on each device, exactly
rehearsal    activation memory of a training step, found without data
scaling      both for several processes, and the bytes that recording, gathering and pruning move
turns        runs two models in turns, with one process per model and mode
worker       the code that such a process runs
figures      every figure of both models, with its floor
"""
