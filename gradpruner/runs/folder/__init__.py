"""The run directory: what is kept of a run, and what of it still holds.

directory   stages with fingerprints, one manifest, one lock
plan_names  names of rows, so that one folder holds the results of many plans
row_names   which row belongs to this recipe's plan
pulse       the progress file of a running job
run_record  what run.json says
"""
