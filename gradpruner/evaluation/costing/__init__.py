"""What a pruned model saves against the dense one, measured: `gradpruner cost`.

`comparison.measure_cost` sizes both models (`sizing`), has one process a model and mode (`worker`,
`worker_process`) run the `workload` in turns (`pairing`), and puts every ratio beside the floor that depth
alone allows (`figures`). `gate` is the only clock.
"""
