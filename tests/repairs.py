"""What the tests of repair share: samples, batches, plans, and states measured without any of its code."""

import random

import torch

from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import drawn
from gradpruner.plans.layer_plan import PruningPlan

SEED = 3


def make_ids(count=40, seed=0, vocabulary=64, longest=9):
    """Samples of different lengths, of two tokens at least."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [1, *(draw.randrange(3, vocabulary) for _ in range(draw.randint(1, longest)))]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return rows


def collate(rows):
    """Padded on the right, with a mask."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, line, real in zip(rows, ids, mask, strict=True):
        line[: len(row["input_ids"])] = torch.tensor(row["input_ids"])
        real[: len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def dropping(layers, depth=6):
    return PruningPlan.from_keep(depth, [i for i in range(depth) if i not in layers])


def in_order(rows, count, seed=SEED):
    """The samples that are drawn, in the order they are numbered: the longest first."""
    return sorted(drawn(rows, count, seed), key=lambda row: -len(row["input_ids"]))


@torch.no_grad()
def states_behind(model, layer, rows):
    """What a layer of a model hands on for every sample, one sample at a time, so nothing is padded."""
    found = []

    def keep(module, args, output):
        found.append((output[0] if isinstance(output, tuple) else output)[0].double())

    hook = LayeredModel(model).layers[layer].register_forward_hook(keep)
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    hook.remove()
    return found


@torch.no_grad()
def inputs_of(model, layer, name, rows):
    """What goes into one module of a layer for every sample, one sample at a time."""
    found = []
    module = LayeredModel(model).layers[layer].get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0].double()))
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    hook.remove()
    return [x.reshape(-1, x.shape[-1]) for x in found]


def without_first(states, chosen=lambda number: True):
    """The tokens of some samples as one matrix, the first of each left out, as numpy."""
    return torch.cat([state[1:] for n, state in enumerate(states) if chosen(n)]).numpy()


def relative_errors(target, found, chosen=lambda number: True):
    """Mean over tokens of |h - y|^2 / |h|^2."""
    h, y = without_first(target, chosen), without_first(found, chosen)
    return float((((h - y) ** 2).sum(1) / (h**2).sum(1)).mean())
