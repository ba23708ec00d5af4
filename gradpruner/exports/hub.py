"""Pushes a finished model to the hub: checks it, collects its files, writes its card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, GradPrunerError, ResourceError
from gradpruner.exports.shipped import FinishedModel, unfinished, unfinished_of, whole_model
from gradpruner.models.card import CARD_FILE, Base, Figure, Results, base_of, model_card, untuned
from gradpruner.models.folder import PRUNING_FILE, carried_files
from gradpruner.models.headers import check_inside
from gradpruner.models.loading import load_tokenizer
from gradpruner.reports.record import VariantRecord

REPORT = "report.html"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TOLD_VERSIONS = ("torch", "transformers", "peft")
_WHOLE_TAIL = 60  # tokens; runs record only the end of longer prompts


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Attributes:
        public: Whether anybody may see the repository.
        report: Whether to push the report too.
        base_model: Hub id of the base model, if it is not known.
        licence: Licence of the base model, if it is not known.
    """

    public: bool = False
    report: bool = True
    base_model: str | None = None
    licence: str | None = None


def check_name(repo: str) -> str:
    """Returns the name of a repository if the hub allows it.

    Raises:
        ConfigError: If it has no owner or cannot be a name on the hub.
    """
    parts = repo.split("/")
    if len(parts) != 2:
        raise ConfigError(f"'{repo}' names no owner.", hint="Write it as org/name or you/name.")
    if not all(_PART.fullmatch(part) and ".." not in part and "--" not in part for part in parts):
        raise ConfigError(
            f"'{repo}' cannot be a name on the hub.",
            hint="Use letters, digits, '-', '_' and '.', at most 96 on each side of the '/'.",
        )
    return repo


def check_finished(model: FinishedModel) -> None:
    """Raises ConfigError if the run is not finished, or the folder was not made by gradpruner."""
    if model.run is None and not (model.folder / PRUNING_FILE).is_file():
        raise ConfigError(
            f"{model.folder} was not made by gradpruner, so there is nothing to write in its card.",
            hint="`hf upload` pushes any folder as it is.",
        )
    if model.run is None:
        return
    left = unfinished_of(model)
    if not left and model.found.evaluation.metrics:
        return
    raise unfinished(model.run, ", ".join(left) or f"'{model.row}' is not measured")


def hub_token() -> str:
    """Returns the token to push with; it is never shown.

    Raises:
        ConfigError: If there is no token.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ConfigError(
            "There is no token for the hub on this machine.",
            hint="Run `hf auth login` with a token that may write, or set HF_TOKEN. --dry-run needs none.",
        )
    return token


@contextmanager
def files_to_push(model: FinishedModel, repo: str, options: PushOptions) -> Iterator[dict[str, Path | bytes]]:
    """Yields name in the repository -> file or content; a merged model is deleted when the block ends."""
    beside = model.run / "push" if model.run is not None else model.folder.with_name(model.name)
    with whole_model(model, beside) as folder:
        card = model_card(_base(model, options), model.plan, model.facts, _results(model, repo))
        found: dict[str, Path | bytes] = {CARD_FILE: card.encode("utf-8")}
        paths = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.safetensors.index.json"))]
        paths += [folder / "config.json", *carried_files(folder)]
        for path in paths:
            found[str(path.relative_to(folder))] = check_inside(folder, path)
        base = _base(model, PushOptions())
        facts = _without_paths(model.facts)
        if not facts.get("previous"):  # otherwise the source is a model of ours, and the hub's lies before it
            facts["source"] = base.hub_id or Path(base.name).name
        found[PRUNING_FILE] = json.dumps(facts, indent=2).encode("utf-8")
        report = model.run / REPORT if model.run is not None and options.report else None
        if report is not None and report.is_file():
            found[REPORT] = report
        yield found


def _without_paths(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of a pruning, and of those before it, with names instead of paths of this machine."""
    found, before = dict(facts), facts.get("previous")
    source = found.get("source")
    if isinstance(source, str) and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        found["source"] = Path(source).name
    return found | ({"previous": _without_paths(before)} if isinstance(before, dict) else {})


def _base(model: FinishedModel, options: PushOptions) -> Base:
    """Returns what the model was made from, by the user's options or else the card beside it."""
    source = untuned(model.facts) or model.folder.name
    base = base_of(source, model.base if model.is_adapter else model.folder)
    metadata = dict(base.metadata or {}) | ({"license": options.licence} if options.licence else {})
    return replace(base, hub_id=options.base_model or base.hub_id, metadata=metadata)


def _results(model: FinishedModel, repo: str) -> Results | None:
    """Returns the results for the card; None if the model does not come from a run."""
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
    """Returns the name of a source of rows, without folders of this machine."""
    text = str(source or "not said")
    return Path(text).name if text.startswith(("/", ".", "~")) else text


def _example(model: FinishedModel) -> str | None:
    """Returns a complete prompt of the task, without the start token that the tokenizer adds; else None."""
    tokenizer = load_tokenizer(model.base if model.is_adapter else model.folder)
    for prompt in model.asked():
        if len(tokenizer.encode(prompt, add_special_tokens=False)) < _WHOLE_TAIL:
            return prompt.removeprefix(tokenizer.bos_token or "").lstrip(" ")
    return None


def push(files: dict[str, Path | bytes], repo: str, options: PushOptions, token: str) -> str:
    """Creates the repository if it does not exist, and pushes all files as one commit.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: If the token lacks the right, or the repository is public but `options.public` is False.
        ResourceError: If the hub cannot be reached or refuses the files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        if api.repo_exists(repo):
            if not options.public and not api.model_info(repo).private:
                raise ConfigError(
                    f"{repo} exists and is public.", hint="Add --public, or push to another name."
                )
            url = f"{api.endpoint}/{repo}"
        else:
            url = str(api.create_repo(repo, private=not options.public))
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, added, commit_message="Model, card and report by gradpruner")
    except GradPrunerError:
        raise
    except Exception as error:  # network, permission, quota: errors of many types
        raise _refused(error, repo, token) from None
    return url


def _refused(error: Exception, repo: str, token: str) -> GradPrunerError:
    """Returns an error of the hub in words, without the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = str(error).replace(token, "<token>").strip().splitlines() or [type(error).__name__]
    if status in (401, 403):
        return ConfigError(
            f"The token may not push to {repo} (status {status}).",
            hint="Make a token on the hub that may write for this owner, then run `hf auth login`.",
        )
    return ResourceError(
        f"{repo} was not pushed: {said[-1][:300]}",
        hint="Try again. A push is one commit, so no part of it was pushed.",
    )


def licence_is_known(model: FinishedModel, options: PushOptions) -> bool:
    """Whether the card can name a licence."""
    return bool(options.licence or (_base(model, options).metadata or {}).get("license"))
