"""Output for people: numbers formatted as text, and results that print as short tables.

Missing and non-finite numbers are shown as a dash, never as 'nan'. Tables are plain text in a terminal or
script, and HTML in a notebook.
"""

from __future__ import annotations

import codecs
import html
import io
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "–"
_NBSP = "\u00a0"
_ASCII = str.maketrans({
    "–": "-", "−": "-", "×": "x", "→": "->", "…": "...", "·": ".", "⟦": "[", "⟧": "]", _NBSP: " ",
})  # fmt: skip
SUBSTITUTE = "gradpruner.substitute"
"""Error handler of a stream: a symbol that it cannot show becomes ASCII."""
WIDTH = 110
"""Width in characters where the output device does not state its own."""


class Printed:
    """Base of results that people look at. `print(x)` and notebooks display what `show` prints."""

    def show(self, console: Console) -> None:
        """Prints sentences and tables to the console, using only the colours and symbols it supports."""
        raise NotImplementedError

    def __str__(self) -> str:
        from rich.console import Console

        class Screen(io.StringIO):
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

        screen = Screen()
        self.show(Console(file=screen, width=WIDTH, force_jupyter=False, color_system=None))
        lines = (line.rstrip() for line in screen.getvalue().splitlines())
        return "\n".join(lines).strip("\n")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from rich.console import Console

        parts: list[str] = []

        class Page(Console):
            def print(self, *objects: Any, **how: Any) -> None:
                parts.extend(map(_as_html, objects))

        self.show(Page(file=io.StringIO(), width=WIDTH, force_jupyter=False))
        return "\n".join(parts)


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    notes: Iterable[str] = (),
) -> None:
    """Prints a title, a table whose numeric columns are right-aligned, and notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    texts = [
        [plain(f"{value:.4g}" if isinstance(value, float) else str(value), console) for value in row]
        for row in rows
    ]
    shown = Table(
        box=box.ASCII if console.options.ascii_only else box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(columns),
    )
    for name, *cells in zip(columns, *texts, strict=True):
        numbers = all(re.fullmatch(r"[\d.e+-]+%?", cell) for cell in cells)
        shown.add_column(Text(plain(name, console)), justify="right" if numbers else "left", overflow="fold")
    for cells in texts:
        shown.add_row(*map(Text, cells))  # as Text, so that a name such as "[red]" is not read as markup
    print_line(console, title, "bold")
    console.print(shown)
    for note in notes:
        print_line(console, f"Note: {note}")


def print_line(console: Console, line: str, style: str = "") -> None:
    """Prints a line literally, without reading it as markup, in the symbols the console can show."""
    from rich.text import Text

    console.print(Text(plain(line, console), style=style))


def plain(shown: str, console: Console) -> str:
    """Replaces no-break spaces and, on a console without Unicode, everything beyond ASCII."""
    shown = shown.replace(_NBSP, " ")
    return shown.encode("ascii", SUBSTITUTE).decode("ascii") if console.options.ascii_only else shown


def _substituted(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    shown = error.object[error.start : error.end].translate(_ASCII)
    return shown.encode("ascii", "replace").decode("ascii"), error.end


codecs.register_error(SUBSTITUTE, _substituted)


def _as_html(printed: Any) -> str:
    """Converts an object given to `Console.print` to HTML."""
    from rich.table import Table

    if not isinstance(printed, Table):
        weight = "bold" if "bold" in str(getattr(printed, "style", "")) else "normal"
        style = f"white-space: pre-wrap; margin: 0.3em 0; font-weight: {weight}"
        return f'<pre style="{style}">{_escaped(printed)}</pre>'

    def row(tag: str, cells: Iterable[Any]) -> str:
        sides = (f' style="text-align: {column.justify}; padding: 0 0.6em"' for column in printed.columns)
        styled = zip(cells, sides, strict=True)
        return "<tr>" + "".join(f"<{tag}{side}>{_escaped(cell)}</{tag}>" for cell, side in styled) + "</tr>"

    title = f"<caption>{_escaped(printed.title)}</caption>" if printed.title else ""
    head = row("th", (column.header for column in printed.columns)) if printed.show_header else ""
    body = "".join(row("td", cells) for cells in zip(*(c.cells for c in printed.columns), strict=True))
    return f"<table>{title}<thead>{head}</thead><tbody>{body}</tbody></table>"


def _escaped(printed: Any) -> str:
    from rich.text import Text

    text = Text.from_markup(printed) if isinstance(printed, str) else printed
    return html.escape(text.plain if isinstance(text, Text) else str(text))


def number(value: Any) -> float | None:
    """Returns `value` as a finite float, or None for anything else (including booleans, NaN and Inf)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def text(value: Any, limit: int | None = None) -> str:
    """Returns `value` as one line without control characters, cut to `limit` characters."""
    if value is None:
        return MISSING
    if isinstance(value, float) and number(value) is None:
        return MISSING
    spaced = str(value).replace("\n", " ").replace("\t", " ")
    # Control, format and surrogate characters could move the cursor or reverse the line.
    clean = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    if limit is not None and len(clean) > limit:
        return clean[: limit - 1] + "…"
    return clean


def shown(value: Any, length: int = 60) -> str:
    """Formats an untrusted value for a message: one short line without control characters."""
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def percent(value: Any, digits: int = 1) -> str:
    """Formats a fraction (0-1) as a percentage: 0.834 -> '83.4%'."""
    finite = number(value)
    return MISSING if finite is None else f"{100 * finite:.{digits}f}%"


def signed_percent(value: Any, digits: int = 1) -> str:
    """Formats a relative change (a fraction) with its sign: -0.008 -> '−0.8%'."""
    finite = number(value)
    if finite is None:
        return MISSING
    shown = f"{abs(100 * finite):.{digits}f}%"
    if float(shown[:-1]) == 0:
        return shown
    return ("−" if finite < 0 else "+") + shown


def points(difference: Any, digits: int = 1) -> str:
    """Formats a difference between two fractions in percentage points: -0.019 -> '−1.9'."""
    return signed_percent(difference, digits).removesuffix("%")


def times(value: Any) -> str:
    """Formats a ratio: 0.63 -> '0.63×'."""
    finite = number(value)
    if finite is None:
        return MISSING
    return f"{finite:.2f}×" if abs(finite) >= 0.1 or finite == 0 else f"{finite:.2g}×"


def whole(value: Any) -> str:
    """Formats a count in full: 8030261248 -> '8,030,261,248'."""
    finite = number(value)
    return MISSING if finite is None else f"{round(finite):,}"


def short(value: Any) -> str:
    """Formats a count with three significant digits: 8030261248 -> '8.03B'."""
    finite = number(value)
    if finite is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(finite) >= 0.9995 * size:
            return f"{_three_digits(finite / size)}{letter}"
    return f"{finite:.0f}" if finite == int(finite) else _three_digits(finite)


def counted(count: int, noun: str) -> str:
    """Formats a number of things: '1 run', '3 runs'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def runs_of(numbers: Sequence[int]) -> str:
    """Formats ascending numbers with ranges: '3, 7-9'; 'none' if there are none."""
    parts: list[list[int]] = []
    for one in numbers:
        if parts and one == parts[-1][-1] + 1:
            parts[-1].append(one)
        else:
            parts.append([one])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "none"


def readable_bytes(count: float) -> str:
    """Formats a number of bytes in binary units: 17179869184 -> '16.0 GiB'."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        scaled = count / 1024**power
        if abs(scaled) >= 0.9995:
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            return f"{scaled:.{digits}f} {unit}"
    return f"{count:.0f} B"


def num_bytes(value: Any) -> str:
    """Formats a number of bytes without a line break before the unit; a dash if it is unknown."""
    finite = number(value)
    return MISSING if finite is None else readable_bytes(finite).replace(" ", _NBSP)


def duration(value: Any) -> str:
    """Formats seconds: 0.41 -> '0.41 s', 192 -> '3 min 12 s', 7500 -> '2 h 05 min'."""
    finite = number(value)
    if finite is None:
        return MISSING
    if abs(finite) < 99.5:
        return f"{_three_digits(finite) if finite else '0'}{_NBSP}s"
    whole_seconds = round(finite)
    if whole_seconds < 3600:
        minutes, seconds = divmod(whole_seconds, 60)
        return f"{minutes}{_NBSP}min{_NBSP}{seconds:02d}{_NBSP}s"
    hours, minutes = divmod(round(finite / 60), 60)
    return f"{hours}{_NBSP}h{_NBSP}{minutes:02d}{_NBSP}min"


def moment(value: Any) -> str:
    """Formats an ISO 8601 time: '2026-03-01T13:21:07+00:00' -> '2026-03-01 13:21 UTC'."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return text(value)
    # Not converted to the local time zone: the same record must give the same page everywhere.
    zone = " UTC" if when.utcoffset() == timedelta(0) else f" {when:%z}" if when.tzinfo else ""
    return f"{when:%Y-%m-%d %H:%M}{zone}"


def interval(low: Any, high: Any) -> str:
    """Formats an interval of fractions in percent: '[80.1, 86.3]'; '' if an end is unknown."""
    low_finite, high_finite = number(low), number(high)
    if low_finite is None or high_finite is None:
        return ""
    # Adding 0.0 turns -0.0 into 0.0. The minus sign is the one used in all other percentages.
    shown = (f"{round(100 * end, 1) + 0.0:.1f}".replace("-", "−") for end in (low_finite, high_finite))
    return f"[{', '.join(shown)}]"


def ratio(after: Any, before: Any) -> float | None:
    """Returns after / before, or None if the result is not a finite number."""
    after_finite, before_finite = number(after), number(before)
    if after_finite is None or not before_finite:
        return None
    return number(after_finite / before_finite)


def _three_digits(value: float) -> str:
    """Formats a number below about 1000 with three significant digits and no exponent."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.01 else f"{value:.1g}"
