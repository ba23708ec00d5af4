"""The number a worked answer ends with."""

from __future__ import annotations

import re

# A number as people and models write it: 18, -5, $1,234.50, -$3, .5, also with a typographic minus. A hyphen
# after a digit or letter is not a sign ("10-15"), and a digit after a letter does not begin a number ("x2").
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?<!\d\.)"
    r"(?P<sign>[-\u2212]?\$?[-\u2212]?)"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,])|\d+|(?<!\.)(?=\.\d))(?P<fraction>\.\d+)?"
)
_COMPOSED = re.compile(r"\d\s?[/:]\s?\d|\d[eE][+-]?\d|\d,\d{1,2}(?!\d)|\d[ \u00a0\u202f]\d{3}(?!\d)")
_ANSWER_MARK = "####"


def marked_answer(text: str) -> str:
    """Returns what stands on the line of the first "####", behind it; "" if there is none."""
    return text.partition(_ANSWER_MARK)[2].partition("\n")[0].strip()


def is_composed(text: str) -> bool:
    """Returns whether a text has a number that `final_number` would cut: 3/4, 5:30, 1e5, 3,5 or 1 234."""
    return _COMPOSED.search(text) is not None


def final_number(text: str) -> str | None:
    """Returns the number a worked answer ends with, normalised; None if the text has no number.

    This is the convention of GSM8K: the last number on the line of the first "####", or, if there is none,
    the last number of the whole text. Currency signs, thousands separators and redundant zeros are removed:
    "$18.00", "18." and "18" all become "18".

    Source: Cobbe et al., "Training verifiers to solve math word problems", 2021.
    """
    # Text after this line is not part of the answer: a model that does not stop asks itself a new question.
    found = list(_NUMBER.finditer(marked_answer(text))) or list(_NUMBER.finditer(text))
    if not found:
        return None
    sign, digits, fraction = found[-1].group("sign", "digits", "fraction")
    whole = digits.replace(",", "").lstrip("0") or "0"
    number = whole + (fraction or "").rstrip("0").rstrip(".")
    return f"-{number}" if sign.strip("$") and number != "0" else number
