"""The job: a recipe with its model and rows opened and checked, before any weights load.

job              Job
inputs           the model without weights and the rows of a recipe
evaluation_data  reads the rows and chooses the metrics
early_checks     refuses what methods, packages or this machine cannot do
data_warnings    warnings about rows and training length
budget           plans from scores and the recipe's budget
"""
