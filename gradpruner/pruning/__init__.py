"""Carrying a plan out, in memory and on disk, and proving the result.

in_memory       prune_: a plan carried out on a loaded model
blueprint       a pruned checkpoint, decided before anything is written; disk_names: names it finds layers by
on_disk         prune_checkpoint: the model is never built; widths_on_disk: for plans of widths
pieces          what a file will hold; writer: safetensors files written from pieces of others;
                checked: reading back what is being written
verification    the gate every pruned checkpoint passes; behaviour: what both models compute there
on_demand       models whose weights are read from their files when they are used
refitting       fit_repair: linears refitted; ridge: the regressions it rests on; tokens: on what
delta           a pruned checkpoint as its difference from the source; delta_record: its record;
                rebuilding: made again from them
"""
