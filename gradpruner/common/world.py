"""The processes that do one job together, started by torchrun, accelerate launch or srun; usually one.

Data parallelism: each has a share of the rows. The first one runs the command and owns what is written (run
folder, plans, models, report); the others wait for work that all do at the same time (`runs/together.py`).

    world = this_world()
    task = world.agreed(lambda: task)      # what the first one says, on all
    result = world.in_step(work)           # all do it, and know whether it went well everywhere
    answers = world.in_order(mine)         # what each found for its share, put together
    world.sum_on_first(tensors)            # sums over all rows, where the first one goes on with them

With one process each of these does nothing but the work itself. A process that ends early says why in the
store that all share, so that the first one can report it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from gradpruner.common.errors import ConfigError, GradPrunerError, ResourceError
from gradpruner.common.files import unusable

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# The first process may prune or score for hours while the others wait for its word. One that dies is noticed
# at once all the same: its connection closes.
PATIENCE = timedelta(days=7)
# Exit codes of a process that was told to end, by Ctrl-C or SIGTERM.
INTERRUPTED = (130, 143)
# A process that failed waits this long for the others to fail too, as they do when a loss becomes NaN.
GRACE = timedelta(seconds=15)


class PeerError(ResourceError):
    """Another process of the job failed, and says why."""


class GoneError(PeerError):
    """Another process of the job has ended, or can be reached no longer: the job is over."""


class _HeededError(PeerError):
    """Work was given up because another process failed; that one says why."""


@dataclass
class World:
    """This process among those of the job.

    Attributes:
        rank: Which one this is, 0 <= rank < size.
        size: How many there are.
        group: What they talk through (a gloo process group); None when there is one.
        broken: Whether this one left the others in the middle of common work (Ctrl-C), or one of them is
            gone: they no longer work together.
        steps: How many times `in_step` was called; the same on all.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    broken: bool = False
    steps: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process owns what is written."""
        return self.rank == 0

    def agreed(self, work: Callable[[], T]) -> T:
        """Runs `work` on the first process alone; returns its result on all.

        Raises:
            PeerError: On the others, when `work` failed on the first, which raises the error itself.
        """
        if self.size == 1:
            return work()
        if self.broken:
            raise GoneError("The processes of this job no longer work together.")
        if not self.is_first:
            value, failure = self._heard()
            if failure is not None:
                raise failure
            return value  # type: ignore[no-any-return]
        try:
            result = work()
        except BaseException as error:
            self._say(None, _told(error))
            raise
        self._say(result, None)
        return result

    def in_step(self, work: Callable[[], T]) -> T:
        """Runs work on all processes at the same time, each on its share, and waits for all of them.

        Raises:
            PeerError: If it failed on other processes alone. As after any other error that all know of, the
                job can go on.
            GoneError: If it failed so that the processes no longer wait for each other.
        """
        if self.size == 1:
            return work()
        import torch.distributed as dist

        self.steps += 1
        arrived = f"{_ARRIVED}/{self.steps}"
        failure: Exception | None = None
        try:
            result = work()
        except GoneError:
            raise
        except Exception as error:
            if _is_connection(error):  # whoever it was connected to is gone
                self.broken = True
                raise _gone(error) from error
            failure = error
        except BaseException as error:
            self.broken = True
            _leave_word(error)
            raise
        _count(arrived, 1)
        if failure is not None:
            _count(_FAILED, 1)
            if not self._all_come(arrived):  # they wait in the middle of the work, for this one
                self.broken = True
                _leave_word(failure)
                raise failure
            _count(_FAILED, -1)
        self._talk(lambda: dist.monitored_barrier(self.group, timeout=PATIENCE))
        own = None if failure is None or isinstance(failure, _HeededError) else failure
        told = self.gathered([_told(own) if own is not None else None])
        if own is not None:
            raise own
        others = [one for one in told if one is not None]
        if others:
            raise others[0]
        return result

    def _all_come(self, arrived: str) -> bool:
        """Whether all processes come to the end of the work within `GRACE`; asked of the store alone."""
        until = time.monotonic() + GRACE.total_seconds()
        while time.monotonic() < until:
            if _count(arrived, 0) >= self.size:
                return True
            time.sleep(0.1)
        return False

    def heed(self) -> None:
        """Called in the middle of long work of `in_step`: ends it if another process failed.

        Raises:
            PeerError: If so; `in_step` then says why.
        """
        if self.size > 1 and _count(_FAILED, 0):
            raise _HeededError("Another process stopped.")

    def gathered(self, values: Sequence[T]) -> list[T]:
        """The values of all processes, those of rank 0 first."""
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        self._talk(lambda: dist.all_gather_object(parts, list(values), group=self.group))
        return [value for part in parts for value in part]

    def share(self, count: int) -> range:
        """The positions among `count` that are this process's; `in_order` puts results back."""
        return range(self.rank, count, self.size)

    def in_order(self, values: Sequence[T]) -> list[T]:
        """One value for every position, from every process's values at its `share`."""
        found = self.gathered([list(values)])
        whole: list[Any] = [None] * sum(map(len, found))
        for rank, part in enumerate(found):
            whole[rank :: self.size] = part
        return whole

    def sum_on_first(self, tensors: Sequence[Tensor]) -> None:
        """Adds up tensors over all processes, in place; only the first one can use them afterwards."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            group = None if tensor.is_cuda else self.group
            self._talk(partial(dist.reduce, tensor, dst=0, group=group))

    def _talk(self, exchange: Callable[[], T]) -> T:
        try:
            return _talk(exchange)
        except GoneError:
            self.broken = True
            raise

    def _say(self, value: Any, failure: PeerError | None) -> None:
        import torch.distributed as dist

        self._talk(lambda: dist.broadcast_object_list([value, failure], src=0, group=self.group))

    def _heard(self) -> tuple[Any, PeerError | None]:
        import torch.distributed as dist

        heard: list[Any] = [None, None]
        self._talk(lambda: dist.broadcast_object_list(heard, src=0, group=self.group))
        return heard[0], heard[1]


def launched() -> bool:
    """Whether a launcher started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "SLURM_")
_OF_ONE_PROCESS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a launcher has put into it, for a program that works alone."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_ONE_PROCESS and not name.startswith(_LAUNCHERS)
    }


@cache
def this_world() -> World:
    """The world this process was started into; meets the other processes at the first call.

    Raises:
        ConfigError: If the launcher's variables are incomplete.
        ResourceError: If the others do not come.
    """
    if not launched():
        return World()
    if os.environ.get("MASTER_PORT") == "0":  # torch would wait for half an hour
        raise ConfigError(
            "MASTER_PORT is 0, where the processes cannot meet.",
            hint="Give torchrun --standalone, or a port: --master-port 29500.",
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} is not set.",
            hint="Start with torchrun or accelerate launch, or unset WORLD_SIZE to work alone.",
        )
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _talk(lambda: dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo"))
    group = _talk(lambda: dist.new_group(backend="gloo", timeout=PATIENCE))
    return World(dist.get_rank(), dist.get_world_size(), group)


def _talk(exchange: Callable[[], T]) -> T:
    """An exchange with the other processes; says so when one of them is gone."""
    try:
        return exchange()
    except RuntimeError as error:  # torch.distributed.DistError is one
        raise _gone(error) from error


def _gone(error: Exception) -> GoneError:
    """The error for a lost connection: the other process's own reason where it left one."""
    return last_word() or GoneError(
        "Another process of this job has ended.",
        hint=f"Its own message says why ({str(error).splitlines()[0][:200]}).",
    )


# What is known of failures is in the store through which the processes met; reading it needs no other one.
_FAILED, _WORD, _ARRIVED = "gradpruner/failed", "gradpruner/word", "gradpruner/arrived"


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _count(what: str, change: int) -> int:
    """A number all processes keep in the store, after a change of it."""
    return int(_talk(lambda: _store().add(what, change)))


def _leave_word(error: BaseException) -> None:
    """Tells the others why this process ends; the first reason of all stays."""
    told = _told(error)
    with contextlib.suppress(RuntimeError):
        _store().compare_set(_WORD, "", json.dumps([str(told), told.exit_code]))


def last_word() -> GoneError | None:
    """Why another process ended, if it said so."""
    if not this_world.cache_info().currsize or this_world().size == 1:
        return None
    try:
        store = _store()
        if not store.check([_WORD]):
            return None
        said, code = json.loads(store.get(_WORD))
    except (RuntimeError, ValueError):
        return None
    error = GoneError(said)
    error.exit_code = code
    return error


def _is_connection(error: Exception) -> bool:
    """Whether an error of gloo or NCCL says no more than that another process cannot be reached."""
    words = ("by peer", "Connection", "NCCL", "timed out")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _told(error: BaseException) -> PeerError:
    """An error as the other processes are told it, with its exit code, so that all end with the same."""
    if isinstance(error, OSError):
        error = unusable(error)
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    if isinstance(error, PeerError):  # another process told it
        told = PeerError(str(error))
    elif isinstance(error, GradPrunerError):
        told = PeerError(f"Another process stopped: {error}")
    elif code in INTERRUPTED:
        told = PeerError("Another process was interrupted.", hint="Start the same command again to go on.")
    else:
        told = PeerError(f"Another process stopped: {type(error).__name__}: {error}")
    told.exit_code = code if isinstance(code, int) else 1
    pickle.dumps(told)  # plain text and a number, whatever the error held
    return told
