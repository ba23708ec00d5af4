"""Studies: a comparison of methods, or a sweep over a setting, repeated over seeds.

file           the file that describes a study
design         from rows, points and seeds to runs
carrying_out   does all runs; a run that fails becomes rows with an error
summary        from the run.json files to study.json
pairing        differences example by example, over seeds
preview        the dry run of a study
comparing      compare: methods at the same budget, as one call
"""
