"""Studies: one comparison of methods, or a sweep over a setting, with seeds.

file           a study as it is written down
design         rows, points and seeds -> runs
carrying_out   every run, one after the other; a run that fails is rows with an error
summary        the run.json files -> study.json
pairing        differences example by example, over seeds
preview        what would run
comparing      compare: methods at one budget, as one call
"""
