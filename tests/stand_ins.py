"""Stand-ins for what tests cannot or need not start."""

import os
import threading
from multiprocessing.connection import Connection
from typing import ClassVar


class FakeProcess:
    """A thread in place of a process: the dense model takes 2 s per step, any other model 1 s."""

    order: ClassVar[list[str]] = []
    failing: ClassVar[str] = ""

    def __init__(self, command, *, pass_fds, **_):
        (descriptor,) = pass_fds
        assert f"main({descriptor})" in command[-1]
        self.thread = threading.Thread(target=self.answer, args=(Connection(os.dup(descriptor)),))
        self.thread.start()

    def answer(self, turns):
        with turns:
            subject, mode, workload = turns.recv()
            name = str(subject.depth)
            if self.failing == name:
                turns.send({"error": "out of memory"})
                return
            turns.send({"ready": True})
            for step in range(workload.steps):
                turns.recv()
                self.order.append(name)
                seconds = (2.0 if name == "6" else 1.0) if step >= workload.warmup else 99.0
                times = {
                    "prefill_seconds": seconds,
                    "decode_seconds": seconds,
                    "generation_seconds": 3 * seconds,
                }
                turns.send(times if mode == "inference" else {"step_seconds": seconds})
            peak = 1000 if name == "6" else 800
            turns.send({"peak_bytes": peak, "empty_bytes": 600, "kind": "rss"})

    def wait(self, timeout=None):
        self.thread.join(timeout)
        return 0

    def kill(self):
        pass
