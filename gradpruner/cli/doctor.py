"""`gradpruner doctor`: checks whether this machine is ready, and says what is missing."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradpruner.common.printing import readable_bytes
from gradpruner.common.provenance import machine
from gradpruner.common.version import __version__

# Oldest versions without known security holes; pyproject.toml gives the reasons.
FLOORS = {"torch": (2, 10), "transformers": (5, 3), "peft": (0, 18), "accelerate": (1, 12)}
NEEDED = ("datasets", "safetensors", "pydantic", "typer", "rich", "jinja2", "matplotlib", "psutil")
OPTIONAL = {
    "bitsandbytes": "QLoRA and 8-bit optimizers (pip install gradpruner[quant])",
    "trl": "recording inside TRL's SFTTrainer (pip install gradpruner[trl])",
}


def diagnose() -> dict[str, Any]:
    """Checks versions, devices, disk and optional packages.

    Returns:
        JSON values. `problems` lists what stops gradpruner from working; it is empty when all is well.
    """
    problems = []
    versions: dict[str, str | None] = {"python": sys.version.split()[0], "gradpruner": __version__}
    for name in (*FLOORS, *NEEDED):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed: pip install {name}")
    for name, floor in FLOORS.items():
        found = versions[name]
        if found is not None and _release(found) < floor:
            wanted = ".".join(map(str, floor))
            problems.append(f"{name} {found} is too old: pip install '{name}>={wanted}'")
    hardware = machine()
    free = shutil.disk_usage(Path.cwd()).free
    if free < 2e9:
        problems.append(f"only {readable_bytes(free)} of disk space free in {Path.cwd()}")
    return {
        "versions": versions,
        "machine": hardware,
        "bf16": _bf16(),
        "free_disk_bytes": free,
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "problems": problems,
    }


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _bf16() -> str:
    """Returns how this machine computes in bfloat16: 'native', 'missing' or 'emulated, ...'."""
    import torch

    if torch.cuda.is_available():
        return "native" if torch.cuda.is_bf16_supported() else "missing"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8") if cpu.exists() else ""
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    return "native" if native else "emulated and slow, so fp32 is used"


def print_findings(findings: dict[str, Any], console: Console) -> None:
    """Prints what `diagnose` found."""
    table = Table("package", "version", title="gradpruner doctor", title_justify="left")
    for name, version in findings["versions"].items():
        table.add_row(name, version or "[red]missing[/red]")
    for name, present in findings["optional"].items():
        shown = "installed" if present else escape(f"not installed; needed for {OPTIONAL[name]}")
        table.add_row(f"{name} (optional)", shown)
    console.print(table)
    hardware = findings["machine"]
    devices = ", ".join(map(str, hardware["devices"])) or "CPU only"
    cores = hardware["cores"]
    console.print(
        f"{hardware['cpu']}, {cores} core{'' if cores == 1 else 's'}, "
        f"{readable_bytes(hardware['memory_bytes'])} memory; devices: {devices}; bf16: {findings['bf16']}; "
        f"{readable_bytes(findings['free_disk_bytes'])} disk free",
        highlight=False,
    )
    for problem in findings["problems"]:
        console.print(f"[bold red]problem:[/bold red] {escape(problem)}", highlight=False)
    if not findings["problems"]:
        console.print("[green]ready[/green]")
