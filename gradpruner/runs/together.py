"""Work that all processes of a job do at the same time: recording, fine-tuning, evaluating.

The first process runs the command as if it were alone. Where a stage is better done by all, it says what is
to be done (`together`): a function of a `Job`, with plain values as arguments. The others do nothing but wait
for that (`follow`), each with a `Job` of its own made of the same recipe. So no stage asks which process it
is in.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.errors import GradPrunerError
from gradpruner.runs.job import Job
from gradpruner.runs.recipe import Recipe
from gradpruner.world import GoneError, this_world

log = logging.getLogger(__name__)

T = TypeVar("T")


def together(job: Job, work: Callable[..., T], *arguments: Any) -> T:
    """Has every process do `work(job, *arguments)` at the same time; returns what this one makes of it.

    Args:
        job: The recipe and its inputs; the other processes have their own.
        work: A function of a module.
        *arguments: Plain values that can be sent.

    Raises:
        PeerError: If it fails on another process; an error of this one as it is.
    """
    world = this_world()
    if world.size > 1:
        recipe = job.recipe.model_dump(mode="json")
        world.agreed(lambda: (recipe, str(job.origin), work, arguments))
    return world.in_step(lambda: work(job, *arguments))


def follow() -> int:
    """Does what the first process says until it ends; returns the exit code it ends with."""
    world = this_world()
    jobs: list[Job] = []

    def carry_out(said: tuple[dict[str, Any], str, Callable[..., Any], tuple[Any, ...]]) -> None:
        recipe, origin, work, arguments = said
        if not jobs or jobs[0].recipe.model_dump(mode="json") != recipe:
            jobs[:] = [Job(Recipe.model_validate(recipe))]
        if jobs[0].origin != Path(origin):
            jobs[0].prune_from(Path(origin))
        work(jobs[0], *arguments)

    while True:
        said: Any = world.agreed(lambda: None)
        if isinstance(said, int):
            return said
        try:
            world.in_step(partial(carry_out, said))
        except GoneError:
            raise
        except GradPrunerError as error:
            log.debug("%s", error)  # the first process knows, and decides how to go on


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
