"""Pushing a finished model to the hub: which files, with which card, and where to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, GradPrunerError, ResourceError
from gradpruner.exports.shipped import FinishedModel, unfinished_stages, whole_model
from gradpruner.models.card import CARD_FILE, Base, Figure, Results, base_of, model_card
from gradpruner.models.folder import PRUNING_FILE, carried_files
from gradpruner.models.headers import check_inside
from gradpruner.models.loading import load_tokenizer
from gradpruner.reports.record import VariantRecord

REPORT = "report.html"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TOLD_VERSIONS = ("torch", "transformers", "peft")
_WHOLE_TAIL = 60  # tokens; a longer prompt may have been cut


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Attributes:
        public: Anybody may see it.
        report: The report goes along.
        base_model: Hub id of the base model, where it is not known.
        licence: Where it is not known.
    """

    public: bool = False
    report: bool = True
    base_model: str | None = None
    licence: str | None = None


def check_name(repo: str) -> str:
    """The name of a repository.

    Raises:
        ConfigError: If it has no owner, or is none.
    """
    parts = repo.split("/")
    if len(parts) != 2:
        raise ConfigError(f"'{repo}' names no owner.", hint="Write it as org/name or you/name.")
    if not all(_PART.fullmatch(part) and ".." not in part and "--" not in part for part in parts):
        raise ConfigError(
            f"'{repo}' cannot be a name on the hub.",
            hint="Letters, digits, '-', '_' and '.', 96 at most on each side.",
        )
    return repo


def check_finished(model: FinishedModel) -> None:
    """ConfigError if the run is still under way, or the folder is not ours."""
    if model.run is None and not (model.folder / PRUNING_FILE).is_file():
        raise ConfigError(
            f"{model.folder} was not made by gradpruner: there is nothing to say in its card.",
            hint="`hf upload` pushes any folder as it is.",
        )
    if model.run is None:
        return
    left = unfinished_stages(model)
    if not left and model.found.evaluation.metrics:
        return
    what = ", ".join(left) or f"'{model.row}' is not measured"
    raise ConfigError(
        f"The run in {model.run} is not finished: {what}.",
        hint=f"Start it again, it goes on where it stopped: gradpruner run --out {model.run}",
    )


def hub_token() -> str:
    """The token to push with; never shown.

    Raises:
        ConfigError: If there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ConfigError(
            "There is no token of the hub on this machine.",
            hint="`hf auth login` stores one that may write, or set HF_TOKEN. --dry-run needs none.",
        )
    return token


@contextmanager
def files_to_push(model: FinishedModel, repo: str, options: PushOptions) -> Iterator[dict[str, Path | bytes]]:
    """Name in the repository -> file or content; adapters are merged in, for as long as the block lasts."""
    beside = model.run / "push" if model.run is not None else model.folder.with_name(model.name)
    with whole_model(model, beside) as folder:
        card = model_card(_base(model, options), model.plan, model.facts, _results(model, repo))
        found: dict[str, Path | bytes] = {CARD_FILE: card.encode("utf-8")}
        paths = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.safetensors.index.json"))]
        paths += [folder / "config.json", *carried_files(folder)]
        for path in paths:
            found[str(path.relative_to(folder))] = check_inside(folder, path)
        base = _base(model, PushOptions())
        facts = {**model.facts, "source": base.hub_id or Path(base.name).name}  # no folder of this machine
        found[PRUNING_FILE] = json.dumps(facts, indent=2).encode("utf-8")
        report = model.run / REPORT if model.run is not None and options.report else None
        if report is not None and report.is_file():
            found[REPORT] = report
        yield found


def _base(model: FinishedModel, options: PushOptions) -> Base:
    """What the model was made from: the card beside it says so, unless the user does."""
    source = str(model.facts.get("source") or model.folder.name)
    base = base_of(source, model.base if model.is_adapter else model.folder)
    metadata = dict(base.metadata or {}) | ({"license": options.licence} if options.licence else {})
    return replace(base, hub_id=options.base_model or base.hub_id, metadata=metadata)


def _results(model: FinishedModel, repo: str) -> Results | None:
    """What the card says was measured, where the model comes from a run."""
    record = model.record
    dense = record.variants.get("dense", VariantRecord()).evaluation.metrics
    figures = [
        Figure(metric, found.value, found.low, found.high, dense[metric].value if metric in dense else None)
        for metric, found in model.found.evaluation.metrics.items()
        if found.value is not None
    ]
    if not figures:
        return None
    rows, versions, data = record.eval, record.provenance.packages, record.recipe.get("data")
    task = data.get("task") if isinstance(data, dict) else None
    return Results(
        task=str(task or record.title or "own data"),
        rows=_name_of(rows.source),
        num_rows=int(rows.rows) if rows.rows is not None else None,
        trained_on=_name_of(record.train.source),
        figures=tuple(figures),
        versions={"gradpruner": str(record.gradpruner_version)}
        | {name: str(versions[name]) for name in _TOLD_VERSIONS if name in versions},
        prompt=_example(model),
        repo=repo,
    )


def _name_of(source: Any) -> str:
    """Rows by the name of their file, without folders of this machine."""
    text = str(source or "not said")
    return Path(text).name if text.startswith(("/", ".", "~")) else text


def _example(model: FinishedModel) -> str | None:
    """A prompt of the task that is known as a whole, without the start token that the tokenizer writes."""
    tokenizer = load_tokenizer(model.base if model.is_adapter else model.folder)
    for prompt in model.asked():
        if len(tokenizer.encode(prompt, add_special_tokens=False)) < _WHOLE_TAIL:
            return prompt.removeprefix(tokenizer.bos_token or "").lstrip(" ")
    return None


def push(files: dict[str, Path | bytes], repo: str, options: PushOptions, token: str) -> str:
    """Makes the repository where there is none, and pushes all files as one commit.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: If the token may not do that, or the repository is public and nobody said so.
        ResourceError: If the hub cannot be reached or refuses the files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        if api.repo_exists(repo):
            if not options.public and not api.model_info(repo).private:
                raise ConfigError(
                    f"{repo} is there and public.", hint="Say --public, or push to another name."
                )
            url = f"{api.endpoint}/{repo}"
        else:
            url = str(api.create_repo(repo, private=not options.public))
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, added, commit_message="Model, card and report by gradpruner")
    except GradPrunerError:
        raise
    except Exception as error:  # network, permission, quota: many types
        raise _refused(error, repo, token) from None
    return url


def _refused(error: Exception, repo: str, token: str) -> GradPrunerError:
    """An error of the hub in words, the token never among them."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = str(error).replace(token, "<token>").strip().splitlines() or [type(error).__name__]
    if status in (401, 403):
        return ConfigError(
            f"The token may not push to {repo} (status {status}).",
            hint="It needs the right to write, for this owner: make one on the hub, then `hf auth login`.",
        )
    return ResourceError(
        f"{repo} was not pushed: {said[-1][:300]}",
        hint="Nothing is half there: a push is one commit. Try again.",
    )


def licence_is_known(model: FinishedModel, options: PushOptions) -> bool:
    """Whether the card can name a licence."""
    return bool(options.licence or (_base(model, options).metadata or {}).get("license"))
