"""Draws one matplotlib figure as an inline SVG that follows the page's colours, fonts and dark theme."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from gradpruner.common.printing import percent

# Figures are drawn in the light colours. Each colour is then replaced by the CSS variable of that name, so
# that one drawing serves both themes; the light values must therefore be distinct. Series colours follow
# Okabe and Ito.
PALETTE = {
    "ink": ("#1d2733", "#e4eaf0"),
    "muted": ("#5a6774", "#9dabb9"),
    "grid": ("#e1e6eb", "#29333e"),
    "surface": ("#ffffff", "#10161c"),
    "keep": ("#6f93b8", "#5f8fbf"),
    "receive": ("#1f4e79", "#a8cdf0"),
    "merge": ("#d9730d", "#f2994a"),
    "drop": ("#c3ccd5", "#46535f"),
    "series-0": ("#4b5563", "#b4bfca"),
    "series-1": ("#0072b2", "#56aee8"),
    "series-2": ("#d55e00", "#f08a3c"),
    "series-3": ("#009e73", "#2fc79b"),
    "series-4": ("#b05a8c", "#dc8fbb"),
    "series-5": ("#a67c00", "#e0b63a"),
    "series-6": ("#5b4fb3", "#a196f0"),
}
"""Name -> (light, dark)."""

WIDE, HALF = 840, 420
_MOST_POINTS = 120
_LOG_SPREAD = 30.0
"""Positive values with a larger ratio are drawn on a logarithmic scale: on a plain one most look flat."""
DASHES = ((), (6, 2), (2, 1.5), (6, 2, 1.5, 2), (1, 1))
_LINE_WIDTH = 1.8
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def colour(name: str) -> str:
    """Returns the light value of a palette name, for drawing."""
    return PALETTE[name][0]


@contextmanager
def house_style() -> Iterator[None]:
    """Sets matplotlib up for `draw`, and restores its settings afterwards.

    Starts from matplotlib's defaults, so that the user's matplotlibrc does not change the bytes. Use one
    block around all figures of a page: resetting takes as long as drawing a figure.
    """
    settings: dict[Any, Any] = {
        # Keep text as text: small, searchable, in the page's font. User strings are never parsed as TeX.
        "svg.fonttype": "none",
        "svg.hashsalt": "gradpruner",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 12,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcParams.update(matplotlib.rcParamsDefault)
        matplotlib.rcParams.update(settings)
        # DejaVu is only used to measure widths; the browser draws the glyphs, also those DejaVu lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


@dataclass(frozen=True)
class Margins:
    """Room around the axes in CSS pixels; fixed, so that figures on a page line up."""

    left: int = 62
    right: int = 14
    bottom: int = 46
    top: int = 12


def draw(
    identity: str, height: int, paint: Callable[[Axes], None], width: int = WIDE, margins: Margins = Margins()
) -> str:
    """Draws one figure; call it within `house_style`.

    Args:
        identity: Prefix of every id in the SVG, so that ids of figures on one page cannot clash.
        height: In CSS pixels.
        paint: Draws into the axes it receives.
        width: In CSS pixels; narrower screens scroll the figure, so that its text stays readable.
        margins: Room for labels around the axes.

    Returns:
        An `<svg>` element without namespaces, in the page's colours; the same drawing gives the same bytes.
    """
    figure = Figure(figsize=(width / 72, height / 72))
    room = (width - margins.left - margins.right, height - margins.top - margins.bottom)
    axes = figure.add_axes((margins.left / width, margins.bottom / height, room[0] / width, room[1] / height))
    _style(axes)
    paint(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _localise(buffer.getvalue(), identity)


def plain_ticks(axes: Axes, log: bool = False) -> None:
    """Labels the vertical axis with a few short numbers, powers of ten if `log`."""
    if log:
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(LogLocator(subs=[], numticks=6))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value, log))


def whole_ticks(axes: Axes, num_ticks: int) -> None:
    """Puts at most `num_ticks` whole numbers on the horizontal axis."""
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _tick(value: float, log: bool) -> str:
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    if not log and -3 <= exponent < 5:
        return f"{value:,.6g}"
    mantissa = value / 10.0**exponent
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return power if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}·{power}"


def _style(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("muted"))
    axes.tick_params(colors=colour("muted"), length=0, labelsize=12)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="y", color=colour("grid"), linewidth=1)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(colour("muted"))
    axes.yaxis.label.set_color(colour("muted"))


def _localise(svg: str, identity: str) -> str:
    """Removes what only a stand-alone file needs, prefixes ids, and uses the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Matplotlib's style rule applies to `*`: inlined, it would affect the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None, "matplotlib always writes a view box"
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r'\bid="', f'id="{identity}-', body)
    body = body.replace("xlink:href=", "href=").replace('href="#', f'href="#{identity}-')
    body = body.replace("url(#", f"url(#{identity}-")
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", body)
    names = {light: name for name, (light, _) in PALETTE.items()}
    # Only within style attributes, so that a label such as "#0072b2" stays unchanged.
    body = re.sub(
        r'style="[^"]*"',
        lambda style: re.sub(
            r"#[0-9a-f]{6}",
            lambda found: f"var(--{names[found[0]]})" if found[0] in names else found[0],
            style[0],
        ),
        body,
    )
    head = f'<svg viewBox="{view_box[1]}" aria-hidden="true" focusable="false">'
    return head + re.sub(r"\n\s*", "\n", body).strip()


@dataclass(frozen=True)
class Key:
    """A legend entry: palette name, label, mark ('box', 'dot', 'ring', 'line') and dash pattern."""

    colour: str
    label: str
    mark: str = "box"
    dash: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawn figure. `caption` says how to read it; `description` says what it shows, for screen readers."""

    name: str
    title: str
    caption: str
    description: str
    drawing: str
    legend: tuple[Key, ...] = ()


def series(index: int) -> str:
    """Returns the palette name of the series at `index`; 0 is the dense model."""
    return "series-0" if index == 0 else f"series-{1 + (index - 1) % 6}"


def line(axes: Axes, points: Sequence[tuple[float, float]], index: int, marker: bool = False) -> None:
    """Draws one curve in the colour and dashes of the series `index`."""
    xs, ys = zip(*points, strict=True)
    (curve,) = axes.plot(xs, ys, color=colour(series(index)), linewidth=_LINE_WIDTH)
    if marker or len(points) == 1:
        curve.set_marker("o")
        curve.set_markersize(3.5)
    elif DASHES[index % 5]:
        curve.set_dashes(DASHES[index % 5])


def dash_css(index: int) -> str:
    """Returns the dash pattern of a series in CSS pixels, '' for a solid line."""
    return " ".join(f"{_LINE_WIDTH * length:g}" for length in DASHES[index % 5])


def bucket(points: Sequence[tuple[float, float]]) -> int:
    """Returns how many neighbouring points are averaged into one."""
    return -(-len(points) // _MOST_POINTS)


def averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Averages every `bucket` neighbouring points, so that several noisy curves stay readable."""
    size = bucket(points)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def is_wide(values: Sequence[float]) -> bool:
    """Returns whether values should be drawn on a logarithmic scale."""
    least = min((value for value in values if value > 0), default=0.0)
    return least > 0 and min(values) >= 0 and max(values) > _LOG_SPREAD * least


def loss_axis(axes: Axes, log: bool, label: str) -> None:
    """Labels the axes of a training loss."""
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("training loss")
    plain_ticks(axes, log)


def percent_ticks(axes: Axes, which: str = "y") -> None:
    """Formats an axis as percentages, with enough digits to tell its ticks apart."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(lambda value, _: percent(value, tick_digits(axis)))


def tick_digits(axis: Axis) -> int:
    """Returns how many digits behind the point tell an axis's ticks apart exactly, in per cent; at most 3."""
    ticks = [100 * tick for tick in axis.get_majorticklocs()]
    return next((n for n in range(3) if all(abs(tick - round(tick, n)) < 1e-6 for tick in ticks)), 3)


def settled(points: Sequence[tuple[float, float]]) -> str:
    """Says from which step on the overlap no longer changes."""
    step = points[-1][0]
    for x, y in reversed(points):
        if y != points[-1][1]:
            break
        step = x
    if step == points[-1][0]:
        return "still changed at the last recorded step, so record more steps"
    return f"no longer changes after step {step:,.0f}"
