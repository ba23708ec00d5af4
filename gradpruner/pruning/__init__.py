"""Applies a plan to a model, in memory or on disk, and verifies the result.

in_memory       prune_: apply a plan to a loaded model
blueprint       decide what a pruned checkpoint contains; disk_names: find its layers by tensor names
on_disk         prune_checkpoint: prune a folder without building the model; widths_on_disk: width plans
pieces          describe the tensors of a file to write; writer: write safetensors files from them;
                checked: read back and check a file while it is written
verification    the checks that every pruned checkpoint must pass; behaviour: the outputs they compare
on_demand       models that read each weight from its file when it is used
repair          fit_repair: refit kept layers after a cut
delta           store a pruned checkpoint as its difference from the source; delta_record: delta.json;
                rebuilding: rebuild the checkpoint from source and delta
"""
