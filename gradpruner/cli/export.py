"""Commands for a finished model: export to GGUF and Ollama, push to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradpruner.cli.executing import prepare
from gradpruner.cli.options import JsonOption, QuietOption
from gradpruner.common.errors import ConfigError

if TYPE_CHECKING:
    from gradpruner.exports.shipped import FinishedModel

ModelArgument = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run directory or model folder.")]
VariantOption = Annotated[
    str | None, typer.Option("--variant", help="Use this variant of the run, not the one to ship.")
]


def export(
    model: ModelArgument,
    file: Annotated[
        Path | None,
        typer.Argument(help="GGUF file to write. Default: in RUN/exports, or beside the model folder."),
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write one GGUF file for llama.cpp.")] = False,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="TYPE", help="Quantise to Q4_K_M, Q8_0, ... Default: 16 bits."),
    ] = None,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="Write the GGUF file and a Modelfile beside it.")
    ] = False,
    variant: VariantOption = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp", metavar="DIR", help="llama.cpp's source folder. Default: $LLAMA_CPP_DIR."
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Export a model to GGUF and check its answers.

    llama.cpp's own converter writes the file (pip install 'gradpruner[gguf]', or --llama-cpp DIR). A file
    that gives other answers than the model is removed.
    """
    if not (gguf or ollama):
        raise ConfigError(
            "No export format given.", hint="--gguf writes a GGUF file; --ollama writes a Modelfile as well."
        )
    prepare(quiet)
    from gradpruner.exports.exporting import export_model

    found = _opened(model, variant)
    facts = export_model(found, file, quantize=quantize, ollama=ollama, llama_cpp=llama_cpp)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from gradpruner.common.printing import num_bytes

    if found.reason:
        typer.echo(f"model: {found.folder}. {found.reason}")
    typer.echo(f"gguf: {facts['gguf']} ({facts['type']}, {num_bytes(facts['bytes'])})")
    typer.echo(facts["said"])
    if ollama:
        typer.echo(f"ollama: {facts['modelfile']}. {facts['note']}")
        typer.echo(f"next: ollama create {facts['ollama_name']} -f {facts['modelfile']}")


def _opened(model: str, variant: str | None) -> FinishedModel:
    """Opens the model to export or push; warns first if the run did not learn its task."""
    from gradpruner.exports.shipped import open_model

    found = open_model(model, variant)
    if found.warning:
        typer.echo(f"warning: {found.warning}", err=True)
    return found


def push(
    model: ModelArgument,
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public. Default: private.")
    ] = False,
    variant: VariantOption = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Hub id of the base model, if it is not known.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence, if that of the base model is not known.")
    ] = None,
    no_report: Annotated[
        bool,
        typer.Option("--no-report", help="Leave out report.html, which names this machine and its folders."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files; push nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Push a finished model to the hub, privately by default.

    Uploads weights, tokenizer, model card and report.
    """
    from gradpruner.common.printing import num_bytes
    from gradpruner.exports import hub

    hub.check_name(repo)
    prepare(quiet)
    found = _opened(model, variant)
    hub.check_finished(found)
    options = hub.PushOptions(public, not no_report, base_model, licence)
    token = "" if dry_run else hub.hub_token()
    with hub.files_to_push(found, repo, options) as files:
        sizes = {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in files.items()}
        url = None if dry_run else hub.push(files, repo, options, token)
    facts = {
        "repo": repo,
        "private": not public,
        "model": str(found.folder),
        "row": found.row,
        "files": sizes,
    }
    if as_json:
        typer.echo(json.dumps(facts | {"pushed": url}, indent=2))
        return
    if found.reason:
        typer.echo(f"model: {found.folder}. {found.reason}")
    for name, size in sizes.items():
        typer.echo(f"  {num_bytes(size):>10}  {name}")
    if not hub.licence_is_known(found, options):
        typer.echo(
            "The base model's licence is not known, so the model card says 'unknown'. Give it with --license."
        )
    state = "public" if public else "private"
    typer.echo(f"pushed: {url}" if url else f"dry run: {len(sizes)} files would go to {repo} ({state}).")
