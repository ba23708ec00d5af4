"""The number that a worked answer ends with."""

from __future__ import annotations

import re

# A number as people and models write it: 18, -5, $1,234.50, -$3, .5, with the typographic minus too. A hyphen
# behind a digit or letter is no sign ("10-15"), and a digit behind a letter begins no number ("x2").
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?<!\d\.)"
    r"(?P<sign>[-\u2212]?\$?[-\u2212]?)"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,])|\d+|(?<!\.)(?=\.\d))(?P<fraction>\.\d+)?"
)
_ANSWER_MARK = "####"


def final_number(text: str) -> str | None:
    """The number a worked answer ends with, in one spelling; None if it names none.

    The convention of GSM8K: the last number on the line of the first "####". Where there is none, the last
    number of the whole text. Currency signs and thousands separators go, and so do zeros that say nothing:
    "$18.00", "18." and "18" are all "18".

    Source: Cobbe et al., "Training verifiers to solve math word problems", 2021.
    """
    # What follows the line is no longer the answer: a model that does not stop asks itself a new question.
    marked = text.partition(_ANSWER_MARK)[2].partition("\n")[0]
    found = list(_NUMBER.finditer(marked)) or list(_NUMBER.finditer(text))
    if not found:
        return None
    sign, digits, fraction = found[-1].group("sign", "digits", "fraction")
    whole = digits.replace(",", "").lstrip("0") or "0"
    number = whole + (fraction or "").rstrip("0").rstrip(".")
    return f"-{number}" if sign.strip("$") and number != "0" else number
