"""Work that all processes of a job do at the same time: recording, fine-tuning, evaluating.

The first process runs the command as if it were alone. When a stage is work for all processes, it sends them
a function and its arguments: plain values (`jointly`), or a `Job` and plain values (`together`). The other
processes wait for such work and do it (`follow`), each with a `Job` of its own made from the same recipe. So
no stage needs to know which process it is in.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.common.errors import GradPrunerError
from gradpruner.common.world import GoneError, peer_failure, this_world
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import Recipe

log = logging.getLogger(__name__)

T = TypeVar("T")


def jointly(work: Callable[..., T], *arguments: Any) -> T:
    """Calls `work(*arguments)` in all processes at the same time; returns the result of this process.

    Both are sent to the other processes: `work` must be a function of a module, the arguments plain values.

    Raises:
        PeerError: If the work fails in another process. An error in this process is raised unchanged.
    """
    world = this_world()
    if world.size > 1:
        world.agreed(lambda: (work, arguments))
    return world.in_step(lambda: work(*arguments))


def together(job: Job, work: Callable[..., T], *arguments: Any) -> T:
    """Does the same as `jointly` for `work(job, *arguments)`; each process passes a job of its own."""
    world = this_world()
    if world.size > 1:
        recipe = job.recipe.model_dump(mode="json")
        world.agreed(lambda: (_on_own_job, (recipe, str(job.origin), work, arguments)))
    return world.in_step(lambda: work(job, *arguments))


_own_job: list[Job] = []


def _on_own_job(
    recipe: dict[str, Any], origin: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Calls `work` with this process's own job, made from the recipe of the first process and kept."""
    if not _own_job or _own_job[0].recipe.model_dump(mode="json") != recipe:
        _own_job[:] = [Job(Recipe.model_validate(recipe))]
    if _own_job[0].origin != Path(origin):
        _own_job[0].prune_from(Path(origin))
    work(_own_job[0], *arguments)


def follow() -> int:
    """Does the work that the first process sends, until that process ends; returns its exit code."""
    world = this_world()
    while True:
        with _sigterm_ends_at_once():
            sent: Any = world.agreed(lambda: None)
        if isinstance(sent, int):
            return sent
        work, arguments = sent
        try:
            world.in_step(partial(work, *arguments))
        except Exception as error:
            if world.broken:
                if isinstance(error, GradPrunerError):
                    raise
                log.debug("%s", error, exc_info=error)
                raise peer_failure() or GoneError(str(error)) from error
            # `in_step` has told the first process, which decides what comes next.
            log.debug("%s", error, exc_info=error)


@contextlib.contextmanager
def _sigterm_ends_at_once() -> Iterator[None]:
    """Lets SIGTERM end this process during a wait; Python's own handler would run only after the wait."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Wraps everything the first process does: at the end, it sends the others its exit code."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except GradPrunerError as error:
        code = error.exit_code
        raise
    finally:
        with contextlib.suppress(GoneError):
            this_world().agreed(lambda: code)
