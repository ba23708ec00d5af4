"""Runs: a recipe is carried out stage by stage, can be resumed, and can be repeated over seeds and settings.

recipe     everything a run depends on
job        a recipe with its model and rows opened and checked
row        one row of the comparison, from its plan to its scores
pipeline   run: record, score, plan, prune, fine-tune, evaluate, report
shrinking  prune: a model and rows in, a smaller model out
evaluating evaluate_folder: a model folder or a server, without a run
starting   a first recipe for a model and rows
folder     the run directory and run.json
before     the dry run, time, memory and disk
study      comparisons and sweeps over seeds
"""
