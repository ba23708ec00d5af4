"""What a reader sees of a report: wide and narrow, in the dark, printed, without scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, browser
from test_page import make_run
from test_study_page import make_study

from gradpruner.reports.answers import MOST
from gradpruner.reports.html import render_html

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)

NASTY = "<img src=x onerror='window.broken = 1'></p><script>window.broken = 1</script> {{ 7*7 }}"
COUNTS = {"lost": 40, "won": 20, "right": 30, "wrong": 10}
# What is wrong with how the page looks: [] if nothing is.
FAULTS = r"""
(() => {
  const faults = [], width = document.documentElement.clientWidth;
  const rgb = text => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const found = rgb(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0.5) return found;
    }
    return [255, 255, 255];
  };
  const scrolls = element => {
    for (let at = element.parentElement; at && at !== document.body; at = at.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(at).overflowX)) return true;
    return false;
  };
  const reach = document.documentElement.scrollWidth;
  if (reach > width) faults.push(`scrolls to ${reach}`);
  let shown = 0;
  for (const element of document.querySelectorAll("main *")) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const texts = [...element.childNodes].filter(node => node.nodeType === 3);
    const said = texts.map(node => node.data.trim()).join(" ").trim();
    if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true}) || !box.width) continue;
    if (style.clipPath !== "none" || element.closest("figure [aria-hidden] defs")) continue;
    const name = `${element.tagName} ${element.className?.baseVal ?? element.className} ${said.slice(0, 40)}`;
    if (!scrolls(element) && (box.left < -0.5 || box.right > width + 0.5))
      faults.push(`${name}: ${box.left} to ${box.right} of ${width}`);
    if (!said) continue;
    shown += 1;
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(rgb(ink)), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) faults.push(`${name}: contrast ${contrast.toFixed(2)}`);
    if (parseFloat(style.fontSize) < 9) faults.push(`${name}: ${style.fontSize}`);
  }
  if (shown < 100) faults.push(`only ${shown} texts are visible`);
  return faults;
})()
"""
SHOWN = "[...document.querySelectorAll('.answers li')].filter(e => e.checkVisibility()).map(e => e.className)"


def answers(folder: Path) -> None:
    """Leaves answers such as a run leaves, of which the pruned model loses some and wins some."""
    right = {"lost": (True, False), "won": (False, True), "right": (True, True), "wrong": (False, False)}
    rows: dict[str, list[dict[str, Any]]] = {"dense": [], "merged": []}
    for kind, number in COUNTS.items():
        for i in range(number):
            for name, good in zip(rows, right[kind], strict=True):
                tail = NASTY if i == 0 else f"{kind} {i} " + "a long question " * 30
                said = {"generated": f"{NASTY} {name}", "finished": True, "correct": good}
                rows[name].append({"id": f"{kind}{i}", "prompt_tail": tail, "answer": "x" * 200, **said})
    for name, found in rows.items():
        path = folder / f"variants/{name}/examples.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    answers(folder)
    run = make_run(32, ("dense", "merged", "dropped", "last"), n=500, num_losses=60)
    run["variants"]["last"]["num_parameters"] -= 10**9  # two sizes: quality is drawn against size
    run["variants"]["merged"]["label"] = "a_label_without_any_place_to_break_it_" * 2
    engines = [
        {"engine": name, "status": "ok", "reason": "", "also_unpruned": False} for name in ("vllm", "sglang")
    ]
    for plan in run["plans"].values():
        plan["portability"] = engines
    return {
        "run": render_html(run, folder / "report.html"),
        "study": render_html(make_study(), folder / "study.html"),
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("kind", ["run", "study"])
@pytest.mark.parametrize(
    "how",
    [{"width": 1280}, {"width": 420}, {"width": 1280, "dark": True}, {"width": 420, "dark": True},
     {"width": 800}, {"width": 794, "media": "print"}],
    ids=["wide", "narrow", "dark", "narrow and dark", "between", "printed"],
)  # fmt: skip
def test_all_there_is_can_be_seen_and_read(tab: Browser, pages: dict[str, Path], kind: str, how: Any) -> None:
    tab.open(pages[kind], **how)
    assert tab.ask(FAULTS) == []
    tops = tab.ask(
        "['headline', 'ship', 'results'].map(i => document.getElementById(i).getBoundingClientRect().top)"
    )
    assert tops == sorted(tops) and tops[0] < 300


def test_what_to_do_is_copied(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["run"])
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    lines = tab.ask("[...document.querySelectorAll('#ship .command code')].map(e => e.innerText)")
    folder = str(pages["run"].parent)
    assert [line.split()[0] for line in lines] == [
        f"{folder}/variants/merged/model",
        "vllm",
        "gradpruner",
        "trl",
    ]
    tab.click("#ship .step .copy")
    tab.ask("new Promise(done => setTimeout(done, 100))")
    assert tab.ask("document.querySelector('#ship .step .copy').innerText") == "Copied"
    assert tab.ask("navigator.clipboard.readText()") == lines[1]


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_answers_are_filtered_with_and_without_scripts(
    tab: Browser, pages: dict[str, Path], scripts: bool
) -> None:
    tab.open(pages["run"], scripts=scripts)
    assert set(tab.ask(SHOWN)) == {"lost"}
    for kind, count in COUNTS.items():
        tab.click(f"label[for=answers-{kind}]")
        assert tab.ask(SHOWN) == [kind] * min(count, MOST)
        assert f"({count})" in tab.ask(f"document.querySelector('label[for=answers-{kind}]').innerText")
    tab.click("label[for=answers-all]")
    assert len(tab.ask(SHOWN)) == sum(min(count, MOST) for count in COUNTS.values())
    assert tab.ask("document.querySelector('#ship .copy').checkVisibility()") == scripts


def test_print_shows_what_is_folded_and_filtered_and_no_buttons(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], 794, media="print")
    assert len(tab.ask(SHOWN)) == sum(min(count, MOST) for count in COUNTS.values())
    heights = tab.ask("[...document.querySelectorAll('details > :not(summary)')].map(e => e.offsetHeight)")
    assert len(heights) == 2 and min(heights) > 50
    buttons = "[...document.querySelectorAll('button, .filter label')].some(e => e.checkVisibility())"
    assert not tab.ask(buttons)
    tab.open(pages["run"])
    assert not tab.ask("document.querySelector('#cost details table').checkVisibility()")


def test_rows_are_text_whatever_is_in_them(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["run"])
    assert tab.ask("window.broken") is None
    assert tab.ask(
        "[document.scripts.length, document.querySelectorAll('main img, main script').length]"
    ) == [1, 0]
    assert NASTY in tab.ask("document.querySelector('.answers .lost .prompt').innerText")


def test_no_row_that_another_one_beats_is_bold(tab: Browser, tmp_path: Path) -> None:
    weight = "getComputedStyle(document.querySelector('#results tbody tr:nth-child(2) td')).fontWeight"
    for value, bold in ((0.9, False), (0.8, True)):
        run = make_run(8, ("dense", "merged", "dropped"), num_losses=3, values={"dropped": value})
        tab.open(render_html(run, tmp_path / "report.html"))
        assert (int(tab.ask(weight)) >= 600) == bold
        assert tab.ask("document.querySelector('#results tbody tr:nth-child(2) th').innerText").endswith(
            "to ship"
        )
