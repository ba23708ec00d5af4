"""Names in a run directory, of stages and of files: runs write them, reports and exports read them."""

from __future__ import annotations

from typing import NamedTuple


class StageName(NamedTuple):
    """The words of a stage's name: "evaluate merged on gsm8k" -> "evaluate", "merged", "on gsm8k".

    `row` is "" for "record", the method for "score", and the learning rate for "rate".
    """

    verb: str
    row: str
    rest: str

    @classmethod
    def of(cls, name: str) -> StageName:
        """Takes a name apart; words that are missing are ""."""
        verb, _, words = name.partition(" ")
        row, _, rest = words.partition(" ")
        return cls(verb, row, rest)


def row_file(row: str, part: str) -> str:
    """Returns the path of a file or folder of a row, relative to the run directory."""
    return f"variants/{row}/{part}"
