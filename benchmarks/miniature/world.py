"""An invented town: text about it for pre-training, and a task.

Six trades share the town. Each has its own words for things, doings and qualities. A document is mostly about
one trade, with a few words of others. The text never says which word belongs to which trade; a model has to
learn it from the words that occur together.

The task: a short note mentions words of two trades; which trade is it mainly about? Half of each trade's
words never occur in a training note, so the answer depends on what the model learned in pre-training.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradpruner.demo import DATA_DIR


@dataclass(frozen=True)
class Trade:
    """The words of one trade: things (nouns), doings (past-tense verbs) and qualities (adjectives)."""

    things: tuple[str, ...]
    doings: tuple[str, ...]
    qualities: tuple[str, ...]


def _trade(things: str, doings: str, qualities: str) -> Trade:
    return Trade(tuple(things.split()), tuple(doings.split()), tuple(qualities.split()))


TRADES: dict[str, Trade] = {
    "fishing": _trade(
        "net boat anchor oar sail herring cod pier hook crab buoy mast rudder eel tide deck gull lobster",
        "rowed hauled moored netted anchored sailed gutted baited",
        "salty wet tidal briny slippery seaworthy",
    ),
    "baking": _trade(
        "oven loaf flour yeast dough crust bun pie tray apron cake sugar butter roll pastry tart icing whisk",
        "kneaded baked glazed sifted frosted whipped proved iced",
        "sweet crusty doughy buttery golden sticky",
    ),
    "farming": _trade(
        "plough barn cow hay field tractor fence wheat goat calf harvest orchard sheep "
        "stable hen seed meadow pig",
        "ploughed milked sowed reaped grazed herded watered sheared",
        "muddy ripe grassy fertile woolly rural",
    ),
    "building": _trade(
        "brick ladder hammer beam cement wall crane roof drill plank scaffold tile nail "
        "girder mortar saw joist trowel",
        "drilled plastered nailed tiled hoisted sawed welded paved",
        "dusty solid wooden sturdy concrete level",
    ),
    "healing": _trade(
        "bandage pill nurse fever wound syringe clinic patient cough splint ointment "
        "scalpel pulse dose ward stretcher vaccine crutch",
        "bandaged cured stitched treated healed injected diagnosed nursed",
        "sore feverish sterile painful swollen pale",
    ),
    "printing": _trade(
        "ink page press poster booklet font paper margin cover stamp leaflet headline "
        "column typeface ribbon map letter binder",
        "printed bound stamped trimmed copied typeset folded inked",
        "glossy bold inky blank framed legible",
    ),
}
LABELS = tuple(TRADES)
PEOPLE = (
    "ada",
    "boris",
    "clara",
    "dora",
    "emil",
    "frida",
    "gus",
    "hana",
    "ivo",
    "jana",
    "karl",
    "lena",
    "milo",
    "nora",
    "otto",
    "petra",
    "rosa",
    "sven",
    "tilda",
    "ulla",
    "viktor",
    "wanda",
    "xenia",
    "yuri",
)
TIMES = (
    "today",
    "yesterday",
    "early",
    "late",
    "again",
    "twice",
    "at-noon",
    "in-the-morning",
    "in-the-evening",
    "last-week",
)
PLACES = ("street", "square", "bridge", "hill", "market", "corner", "yard", "gate", "river", "station")

NUM_TRAIN, NUM_TEST, NUM_VALIDATION = 512, 480, 240
TASK_SEED = 7
STRAY_SHARE = 0.12
"""Probability that a trade word of a document comes from a random trade."""
SEEN_SHARE = 0.5
"""Share of each trade's words that may occur in training notes; test notes use all words."""
NUM_STRAYS = 3
"""Most words of the second trade in a note; always fewer than words of its main trade."""


_FORMS = (
    "{who} {doing} the {thing} {when} .",
    "the {quality} {thing} is by the {thing} .",
    "{who} took a {thing} and a {thing} to the {where} .",
    "near the {where} {who} {doing} a {quality} {thing} .",
    "every {thing} was {quality} and {who} {doing} {when} .",
    "{who} asked {who} for the {thing} .",
    "a {thing} without a {thing} is no {thing} .",
    "{who} saw the {quality} {thing} , then {doing} it {when} .",
)
_KINDS = {"thing": "things", "doing": "doings", "quality": "qualities"}
_FILLERS = {"who": PEOPLE, "when": TIMES, "where": PLACES}

Stock = dict[str, Trade]


def _fill(rng: random.Random, form: str, trades: Iterator[str], stock: Stock) -> str:
    """Fills in a sentence form; each trade word comes from the next trade in `trades`."""
    words = []
    for slot in form.split():
        name = slot.strip("{}")
        if name in _KINDS:
            words.append(rng.choice(getattr(stock[next(trades)], _KINDS[name])))
        elif name in _FILLERS:
            words.append(rng.choice(_FILLERS[name]))
        else:
            words.append(slot)
    return " ".join(words)


def _num_trade_words(form: str) -> int:
    return sum(form.count(f"{{{kind}}}") for kind in _KINDS)


def corpus(seed: int) -> Iterator[str]:
    """Yields documents endlessly: three to six sentences each, mostly about one trade.

    Args:
        seed: The same seed gives the same documents.
    """
    rng = random.Random(seed)

    def drawn(main: str) -> Iterator[str]:
        while True:
            yield rng.choice(LABELS) if rng.random() < STRAY_SHARE else main

    while True:
        trades = drawn(rng.choice(LABELS))
        forms = rng.choices(_FORMS, k=rng.randint(3, 6))
        text = [_fill(rng, form, trades, TRADES) for form in forms]
        if rng.random() < 0.3:  # the names of the trades must occur, or zero-shot accuracy has no meaning
            text.append(f"that is how {next(trades)} goes .")
        yield " ".join(text)


def _note(rng: random.Random, label: str, stock: Stock) -> str:
    """Returns a note of two or three sentences: most trade words are from `label`, some from one other."""
    forms = rng.choices(_FORMS, k=rng.randint(2, 3))
    total = sum(map(_num_trade_words, forms))
    strays = min(NUM_STRAYS, (total - 1) // 2)
    other = rng.choice([trade for trade in LABELS if trade != label])
    trades = [label] * (total - strays) + [other] * strays
    rng.shuffle(trades)
    drawn = iter(trades)
    return " ".join(_fill(rng, form, drawn, stock) for form in forms)


def _half(trade: Trade) -> Trade:
    """Returns the words of a trade that training notes may use."""

    def cut(words: tuple[str, ...]) -> tuple[str, ...]:
        return words[: round(len(words) * SEEN_SHARE)]

    return Trade(cut(trade.things), cut(trade.doings), cut(trade.qualities))


def make_rows(seed: int = TASK_SEED) -> tuple[list[dict[str, object]], ...]:
    """Returns training, test and validation rows of the task; no prompt occurs twice.

    Args:
        seed: The same seed gives the same rows.

    Returns:
        Three lists of rows with "prompt", "completion" and "choices".
    """
    rng = random.Random(seed)
    seen: set[str] = set()

    def rows(count: int, stock: Stock) -> list[dict[str, object]]:
        out: list[dict[str, object]] = []
        while len(out) < count:
            label = LABELS[len(out) % len(LABELS)]
            prompt = f"note : {_note(rng, label, stock)} trade :"
            if prompt not in seen:
                seen.add(prompt)
                out.append({"prompt": prompt, "completion": label, "choices": list(LABELS)})
        return out

    train = rows(NUM_TRAIN, {name: _half(trade) for name, trade in TRADES.items()})
    test = rows(NUM_TEST, TRADES)
    rng.shuffle(train)
    rng.shuffle(test)
    # Validation rows were added later; drawing them last leaves the other rows unchanged.
    validation = rows(NUM_VALIDATION, TRADES)
    rng.shuffle(validation)
    return train, test, validation


def write_rows(folder: Path, seed: int = TASK_SEED) -> None:
    """Writes `train.jsonl`, `test.jsonl` and `validation.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test", "validation"), make_rows(seed), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Rewrites the committed rows of the task."""
    parser = argparse.ArgumentParser(description="Write the demo task's rows.")
    parser.add_argument("--out", type=Path, default=DATA_DIR)
    write_rows(parser.parse_args().out)


if __name__ == "__main__":
    main()
