"""A recipe carried out, resumed, repeated over seeds and settings.

recipe           Recipe: everything a run depends on, checked at once; sections: its keys
key_hints        which key of a recipe an unknown one stands for; yaml_files: YAML as plain values
inputs           its model without weights and its rows, opened; job: a recipe with its inputs, checked
early_checks     what its methods, or packages and machine, cannot do
budget           what it comes to: plans from scores; disk: bytes a run writes
shrinking        prune: a model and rows in, a smaller model out
pipeline         run: record, score, plan, repair, prune, fine-tune, evaluate, report
variant          one row of the comparison, stage by stage; work: what each stage does
together         what all processes of a job do at the same time
held_out         choices by the loss on rows that nothing was trained on
rate_search      the learning rate, found on held-out training rows
directory        the run directory: stages, fingerprints, lock; pulse: a file that says what is being done
evaluation_data  rows and metrics a recipe asks for
data_warnings    what to know of the rows before training
plan_names       what rows are called, so that one folder holds the results of many plans;
                 row_names: which of them a recipe's model has
depth_search     how many layers may go
preview          what a dry run says; forecast: about how long the run will take;
                 fitting: whether it fits into memory
run_record       what run.json says
study            several runs compared
"""
