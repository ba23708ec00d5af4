"""Work that all processes of a job do at the same time: recording, fine-tuning, evaluating.

The first process runs the command as if it were alone. Where a stage is better done by all, it says what is
to be done: a function with plain values as arguments (`jointly`), or one of a `Job` (`together`). The others
do nothing but wait for that (`follow`), each with a `Job` of its own made of the same recipe. So no stage
asks which process it is in.
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
from gradpruner.common.world import GoneError, last_word, this_world
from gradpruner.runs.job import Job
from gradpruner.runs.recipe import Recipe

log = logging.getLogger(__name__)

T = TypeVar("T")


def jointly(work: Callable[..., T], *arguments: Any) -> T:
    """Has every process do `work(*arguments)` at the same time; returns what this one makes of it.

    The work is a function of a module, and the arguments plain values: both are sent.

    Raises:
        PeerError: If it fails on another process; an error of this one as it is.
    """
    world = this_world()
    if world.size > 1:
        world.agreed(lambda: (work, arguments))
    return world.in_step(lambda: work(*arguments))


def together(job: Job, work: Callable[..., T], *arguments: Any) -> T:
    """`jointly`, for a function whose first argument is a job: the other processes make their own."""
    world = this_world()
    if world.size > 1:
        recipe = job.recipe.model_dump(mode="json")
        world.agreed(lambda: (_on_own_job, (recipe, str(job.origin), work, arguments)))
    return world.in_step(lambda: work(job, *arguments))


_own_job: list[Job] = []


def _on_own_job(
    recipe: dict[str, Any], origin: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Work on a job of this process, made of the first one's recipe; kept for the next time."""
    if not _own_job or _own_job[0].recipe.model_dump(mode="json") != recipe:
        _own_job[:] = [Job(Recipe.model_validate(recipe))]
    if _own_job[0].origin != Path(origin):
        _own_job[0].prune_from(Path(origin))
    work(_own_job[0], *arguments)


def follow() -> int:
    """Does what the first process says until it ends; returns the exit code it ends with."""
    world = this_world()
    while True:
        with _at_rest():
            said: Any = world.agreed(lambda: None)
        if isinstance(said, int):
            return said
        work, arguments = said
        try:
            world.in_step(partial(work, *arguments))
        except Exception as error:
            if world.broken:
                if isinstance(error, GradPrunerError):
                    raise
                log.debug("%s", error, exc_info=error)
                raise last_word() or GoneError(str(error)) from error
            log.debug("%s", error, exc_info=error)  # the first process knows, and decides how to go on


@contextlib.contextmanager
def _at_rest() -> Iterator[None]:
    """While it lasts, SIGTERM ends this process at once: Python would hear of it only after the wait."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """For the first process, around everything it does: in the end it sends the others home."""
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
