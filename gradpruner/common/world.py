"""The processes of one job, as started by torchrun, accelerate launch or srun. Usually there is only one.

Jobs are data parallel: each process works on a share of the rows. The first process (rank 0) runs the command
and writes all files (run folder, plans, models, report). The others wait for work that all processes do
together (`runs/row/together.py`).

    world = this_world()
    task = world.agreed(lambda: task)      # computed on the first process, returned on all
    result = world.in_step(work)           # run on all processes; an error anywhere is raised everywhere
    answers = world.in_order(mine)         # the answers of all shares, in the order of the rows
    world.sum_on_first(tensors)            # sums over all processes, for the first one to use

With one process, each of these just runs the work. A process that ends early leaves the reason in the store
that all processes share, so that the first one can report it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from gradpruner.common.errors import ConfigError, GradPrunerError, ResourceError
from gradpruner.common.files import os_failure

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Timeout of communication. The first process may prune or score for hours while the others wait. A process
# that dies is noticed at once in spite of it, because its connection closes.
PATIENCE = timedelta(days=7)
# Exit codes after Ctrl-C and SIGTERM.
INTERRUPTED = (130, 143)
# A process that failed waits this long for the others, which may fail too (a NaN loss stops all of them).
GRACE = timedelta(seconds=15)


class PeerError(ResourceError):
    """Another process of the job failed. The message gives its reason."""


class GoneError(PeerError):
    """Another process of the job has ended or can no longer be reached. The job is over."""


class _StoppedError(PeerError):
    """This process stopped its work because another one failed. The other process gives the reason."""


@dataclass
class World:
    """The processes of the job, as seen by this process.

    Attributes:
        rank: Rank of this process, 0 <= rank < size.
        size: Number of processes.
        group: The gloo process group for communication; None with one process.
        broken: Whether the processes can no longer work together: this process left common work half-way
            (Ctrl-C), or another process is gone.
        steps: Number of `in_step` calls so far, the same on all processes.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    broken: bool = False
    steps: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which runs the command and writes all files."""
        return self.rank == 0

    def agreed(self, work: Callable[[], T]) -> T:
        """Runs `work` on the first process only, and returns its result on all processes.

        Raises:
            PeerError: On the other processes, if `work` failed. The first process raises the error itself.
        """
        if self.size == 1:
            return work()
        if self.broken:
            raise GoneError("The processes of this job no longer work together.")
        if not self.is_first:
            value, failure = self._broadcast(None, None)
            if failure is not None:
                raise failure
            return value  # type: ignore[no-any-return]
        try:
            result = work()
        except BaseException as error:
            self._broadcast(None, _for_peers(error))
            raise
        self._broadcast(result, None)
        return result

    def in_step(self, work: Callable[[], T]) -> T:
        """Runs `work` on all processes at the same time, each on its own share, and waits for all of them.

        If `work` fails on this process, its own error is raised. After an error that all processes have
        learned of, the job can continue.

        Raises:
            PeerError: If `work` failed on other processes only.
            GoneError: If the processes can no longer wait for each other. The job is over.
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
            if _is_connection(error):  # the process at the other end is gone
                self.broken = True
                raise _gone(error) from error
            failure = error
        except BaseException as error:
            self.broken = True
            _leave_reason(error)
            raise
        _count(arrived, 1)
        if failure is not None:
            _count(_FAILED, 1)
            if not self._all_arrive(arrived):  # the others are waiting for this process inside `work`
                self.broken = True
                _leave_reason(failure)
                raise failure
            _count(_FAILED, -1)
        self._exchange(lambda: dist.monitored_barrier(self.group, timeout=PATIENCE))
        own = None if failure is None or isinstance(failure, _StoppedError) else failure
        failures = self.gathered([_for_peers(own) if own is not None else None])
        if own is not None:
            raise own
        others = [one for one in failures if one is not None]
        if others:
            raise others[0]
        return result

    def _all_arrive(self, arrived: str) -> bool:
        """Returns whether all processes finish the work within `GRACE`. Asks the store only."""
        until = time.monotonic() + GRACE.total_seconds()
        while time.monotonic() < until:
            if _count(arrived, 0) >= self.size:
                return True
            time.sleep(0.1)
        return False

    def stop_if_peer_failed(self) -> None:
        """Stops this process if another one has failed. Long work in `in_step` calls this repeatedly.

        Raises:
            PeerError: If another process has failed. `in_step` then raises the reason.
        """
        if self.size > 1 and _count(_FAILED, 0):
            raise _StoppedError("Another process stopped.")

    def gathered(self, values: Sequence[T]) -> list[T]:
        """Returns the values of all processes, in the order of their ranks."""
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(parts, list(values), group=self.group))
        return [value for part in parts for value in part]

    def share(self, count: int) -> range:
        """Returns the positions in `range(count)` that belong to this process."""
        return range(self.rank, count, self.size)

    def in_order(self, values: Sequence[T]) -> list[T]:
        """Returns the values of all positions in order, given on each process the values of its `share`."""
        parts = self.gathered([list(values)])
        whole: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def sum_on_first(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors over all processes, in place. Only the first process may use them afterwards."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            group = None if tensor.is_cuda else self.group
            self._exchange(partial(dist.reduce, tensor, dst=0, group=group))

    def _exchange(self, communicate: Callable[[], T]) -> T:
        try:
            return _exchange(communicate)
        except GoneError:
            self.broken = True
            raise

    def _broadcast(self, value: Any, failure: PeerError | None) -> tuple[Any, PeerError | None]:
        """Returns the arguments that the first process gave, on all processes."""
        import torch.distributed as dist

        objects = [value, failure]
        self._exchange(lambda: dist.broadcast_object_list(objects, src=0, group=self.group))
        return objects[0], objects[1]


def launched() -> bool:
    """Returns whether a launcher started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "SLURM_")
_OF_ONE_PROCESS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without the variables set by a launcher, to start a single-process program."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_ONE_PROCESS and not name.startswith(_LAUNCHERS)
    }


@cache
def this_world() -> World:
    """Returns the world of this process. The first call connects to the other processes.

    Raises:
        ConfigError: If the launcher's environment variables are incomplete.
        ResourceError: If the other processes cannot be reached.
    """
    if not launched():
        return World()
    if os.environ.get("MASTER_PORT") == "0":  # torch would wait for half an hour
        raise ConfigError(
            "MASTER_PORT is 0, so the processes cannot connect.",
            hint="Start torchrun with --standalone, or with a port: --master-port 29500.",
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but these are not set: {', '.join(missing)}.",
            hint="Start with torchrun or accelerate launch, or unset WORLD_SIZE to run a single process.",
        )
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _exchange(lambda: dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo"))
    group = _exchange(lambda: dist.new_group(backend="gloo", timeout=PATIENCE))
    return World(dist.get_rank(), dist.get_world_size(), group)


def _exchange(communicate: Callable[[], T]) -> T:
    """Communicates with the other processes. Raises GoneError if one of them is gone."""
    try:
        return communicate()
    except RuntimeError as error:  # includes torch.distributed.DistError
        raise _gone(error) from error


def _gone(error: Exception) -> GoneError:
    """Returns the error for a lost connection, with the other process's own reason if it left one."""
    return peer_failure() or GoneError(
        "Another process of this job has ended.",
        hint=f"Its own message says why ({str(error).splitlines()[0][:200]}).",
    )


# Failures are recorded in the store through which the processes connected: each process can read it without
# the help of the others.
_FAILED, _REASON, _ARRIVED = "gradpruner/failed", "gradpruner/reason", "gradpruner/arrived"


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _count(counter: str, change: int) -> int:
    """Adds `change` to a counter in the store and returns its new value."""
    return int(_exchange(lambda: _store().add(counter, change)))


def _leave_reason(error: BaseException) -> None:
    """Writes to the store why this process ends. If several processes do, the first reason stays."""
    failure = _for_peers(error)
    with contextlib.suppress(RuntimeError):
        _store().compare_set(_REASON, "", json.dumps([str(failure), failure.exit_code]))


def peer_failure() -> GoneError | None:
    """Returns why another process ended, or None if none left a reason."""
    if not this_world.cache_info().currsize or this_world().size == 1:
        return None
    try:
        store = _store()
        if not store.check([_REASON]):
            return None
        reason, code = json.loads(store.get(_REASON))
    except (RuntimeError, ValueError):
        return None
    error = GoneError(reason)
    error.exit_code = code
    return error


def _is_connection(error: Exception) -> bool:
    """Returns whether an error of gloo or NCCL means that another process cannot be reached."""
    words = ("by peer", "Connection", "NCCL", "timed out")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _for_peers(error: BaseException) -> PeerError:
    """Returns the error that the other processes will raise: the message and exit code of `error` alone."""
    if isinstance(error, OSError):
        error = os_failure(error)
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    if isinstance(error, PeerError):  # it came from another process already
        failure = PeerError(str(error))
    elif isinstance(error, GradPrunerError):
        failure = PeerError(f"Another process stopped: {error}")
    elif code in INTERRUPTED:
        failure = PeerError(
            "Another process was interrupted.", hint="Start the same command again to continue."
        )
    else:
        failure = PeerError(f"Another process stopped: {type(error).__name__}: {error}")
    failure.exit_code = code if isinstance(code, int) else 1
    return failure
