"""Runs: a recipe is carried out stage by stage, can be resumed, and can be repeated over seeds and settings.

The recipe
    recipe           Recipe: everything a run depends on, checked as a whole
    sections         the sections of a recipe and their keys
    yaml_files       YAML files as plain values
    key_hints        suggestions for unknown keys
The job
    inputs           the model without weights and the rows of a recipe
    evaluation_data  reads the rows and chooses the metrics
    job              Job: a recipe with its inputs opened and checked
    early_checks     refuses what methods, packages or this machine cannot do
    data_warnings    warnings about rows and training length
    budget           plans from scores and the recipe's budget
The run
    pipeline         run: record, score, plan, prune, fine-tune, evaluate, report
    planning         the plan of one variant
    depth_search     how many layers may go, for plan.max_loss
    variant          the stages of one row of the comparison
    work             what each stage of a row does
    held_out         decisions by the loss on held-out rows
    rate_search      the search for the learning rate
    together         work that all processes of a job do at once
    shrinking        prune: a model and rows in, a smaller model out
The run directory
    directory        stages with fingerprints, one manifest, one lock
    plan_names       names of rows, so that one folder holds the results of many plans
    row_names        which row belongs to this recipe's plan
    pulse            the progress file of a running job
    run_record       what run.json says
Before a run
    preview          the dry run
    forecast         about how long a run takes
    fitting          whether a run fits into memory
    disk             how many bytes a run writes
Several runs
    study            comparisons and sweeps over seeds
"""
