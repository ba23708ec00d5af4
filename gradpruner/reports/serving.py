"""A web server that shows the runs of a folder, on this machine only; it writes nothing.

It answers only GET and HEAD, and serves only the overview page and the report.html of runs found below the
folder. The Host header must name this machine, so that no web site can read the runs under its own name (DNS
rebinding).
"""

from __future__ import annotations

import socketserver
import threading
import time
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from gradpruner.common.errors import ConfigError
from gradpruner.common.files import path_fault, read_plain
from gradpruner.common.printing import MISSING, duration, moment, ratio, short, shown, text, whole
from gradpruner.reports.cells import Cell, Line, Table, difference_cell, exact_cell, line, measured_cell
from gradpruner.reports.figures import curves_plot
from gradpruner.reports.folders import DONE, RUNNING, Found, find_runs, report_of
from gradpruner.reports.html import Section, plots_of, render, script_hash, tables_of
from gradpruner.reports.svg import house_style
from gradpruner.reports.tables import difference
from gradpruner.reports.view import LONGEST_ERROR, Row, View, metric_label

ADDRESS = "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost")
_REFRESH, _REFRESH_IDLE = 5, 30
_MOST_RUNS, _MOST_FIGURES = 300, 6
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501
# Matplotlib's settings are global to the process, so only one thread may draw at a time.
_drawing = threading.Lock()


class Server(ThreadingHTTPServer):
    """The server of one folder, at `url`."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__((ADDRESS, port), partial(_Handler, folder=folder))

    def server_bind(self) -> None:
        """Binds without the DNS lookup of this machine's name that HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def url(self) -> str:
        """The address of the overview page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stays silent if a browser closes its connection."""


def open_server(folder: Path, port: int) -> Server:
    """Opens a server for the runs in a folder; `serve_forever` starts it.

    Raises:
        ConfigError: If the folder does not exist or holds no runs, or the port cannot be used.
    """
    if path_fault(folder) or not folder.is_dir():
        raise ConfigError(f"There is no folder {shown(str(folder), 200)}.")
    if not find_runs(folder)[0]:
        raise ConfigError(
            f"There are no runs in {shown(str(folder), 200)}.",
            hint="Give a run directory (the --out of a run), or a folder that contains some.",
        )
    try:
        return Server(folder, port)
    except OSError as error:
        raise ConfigError(
            f"Port {port} cannot be used: {error.strerror}.",
            hint="Choose another --port; 0 picks a free one.",
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "gradpruner", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain; charset=utf-8"
    timeout = 30

    def __init__(self, *args: Any, folder: Path) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].partition(":")[0].lower() not in _HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost only")
            return
        path = urlsplit(self.path).path
        if path == "/":
            self._send(overview(self.folder).encode("utf-8", "replace"), _POLICY)
            return
        name = unquote(path.removeprefix("/report/"), errors="surrogateescape")
        found = report_of(self.folder, name) if path.startswith("/report/") else None
        try:
            page = read_plain(found) if found is not None else None
        except (OSError, ValueError):
            page = None
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND, "There is no such page")
            return
        # A page in a folder from somebody else may run no script but ours, and may send nothing out.
        self._send(page, f"{_POLICY}; script-src '{script_hash()}'")

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _send(self, page: bytes, policy: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def end_headers(self) -> None:
        for name, value in (
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing, so that the terminal stays quiet."""


def overview(folder: Path) -> str:
    """Returns the page of all runs of a folder, in their current state."""
    found, complete = find_runs(folder)
    running = [run for run in found if run.state == RUNNING]
    with _drawing, house_style():
        curves = [
            curves_plot(f"losses-{i}", f"Loss so far: {_named(run)}", list(run.curves.items()))
            for i, run in enumerate(running[:_MOST_FIGURES])
        ]
    listed = found[:_MOST_RUNS]
    sections = [
        Section("running", "Running", [*tables_of(_running(running)), *plots_of(*curves)]),
        Section("results", "Side by side",
                tables_of(_results(listed)) or [("absent", "Nothing has been evaluated yet.")]),
        Section("all", "All runs", tables_of(_listed(listed))),
    ]  # fmt: skip
    root, states = folder.resolve(), sorted(run.state for run in found)
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    cut = len(found) > len(listed) or not complete
    context = {
        "brand": "GradPruner runs",
        "title": text(root.name or str(root), 100),
        "folder": text(root, 300),
        "counts": f"{counted}{' (not all are shown)' if cut else ''}",
        "when": _moment(time.time()),
        "refresh": _REFRESH if running else _REFRESH_IDLE,
        "sections": [section for section in sections if section.blocks],
    }
    return render("serving.html", context)


def _moment(seconds: float) -> str:
    return moment(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds)))


def _named(run: Found) -> str:
    return text("this folder" if run.name == "." else run.name, 120)


def _name_cell(run: Found) -> Cell:
    link = "" if run.report is None else f"/report/{quote(run.name, errors='surrogateescape')}"
    return Cell(_named(run), link=link)


def _running(found: list[Found]) -> Table:
    """Returns what every running run is doing, and its progress."""
    lines = []
    for run in found:
        now = run.now
        if now is None:
            continue
        share = ratio(now.step, now.steps)
        step = whole(now.step) + (f" of {whole(now.steps)}" if now.steps else "")
        gone = max(0.0, time.time() - now.began) if now.began else None
        stage = text(now.stage or "starting", 120)
        detail = "" if now.doing in (None, now.stage) else text(now.doing, 80)
        cells = (
            _name_cell(run),
            Cell(stage, detail),
            Cell(step, share=None if share is None else min(1.0, max(0.0, share))),
            MISSING if now.loss is None else f"{now.loss:.4g}",
            short(now.tokens_per_second),
            duration(gone),
            duration(now.left),
        )
        lines.append(line(*cells))
    columns = ("Run", "Stage", "Step", "Loss", "Token positions/s", "Running for", "Time left")
    return Table("Runs in progress, current stage", columns, lines, words=("Stage",))


def _results(found: list[Found]) -> Table:
    """Returns every evaluated row of every run and study."""
    lines = [
        _row_line(run, run.view, point.label, row)
        for run in found
        if run.view is not None
        for point in run.view.points
        for row in point.rows
        if row.error is not None or row.after
    ]
    columns = ("Run", "Row", "State", "Metric", "Score [95%; studies: seeds]", "Difference to dense [95%]",
               "Parameters", "Time")  # fmt: skip
    return Table("Rows of all runs", columns, lines, words=("Row", "State", "Metric"))


def _row_line(run: Found, view: View, setting: str, row: Row) -> Line:
    label = f"{setting}: {row.label}" if view.kind == "ablation" else row.label
    error = text(row.error, LONGEST_ERROR) if row.error else ""
    cells = (
        _name_cell(run),
        text(label, 100),
        "failed" if error else run.state,
        metric_label(view.metric),
        measured_cell(row.after.get(view.metric)),
        difference_cell(difference(view, row)),
        exact_cell(short, row.num_parameters),
        exact_cell(duration, row.costs.get("total_seconds")),
    )
    return line(*cells, kind="failed" if error else "", error=error)


def _listed(found: list[Found]) -> Table:
    kinds = {"run": "run", "compare": "comparison", "ablation": "ablation"}
    lines = []
    for run in found:
        title = text(run.view.record.title, 80) if run.view else MISSING
        kind = kinds[run.view.kind] if run.view else MISSING
        report = Cell("report", link=_name_cell(run).link) if run.report else Cell(MISSING)
        cells = (_name_cell(run), title, kind, run.state, _moment(run.changed), report)
        failed = "" if run.state in (RUNNING, DONE) else "failed"
        lines.append(line(*cells, kind=failed, error=run.fault))
    columns = ("Run", "Title", "Kind", "State", "Last written", "Report")
    return Table("Everything found", columns, lines, words=columns[1:])
