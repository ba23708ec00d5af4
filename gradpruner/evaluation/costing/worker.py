"""Worker: the other end of `cost_worker`, a process that measures one model in one mode, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from gradpruner.errors import ResourceError
from gradpruner.evaluation.costing.subject import Subject
from gradpruner.evaluation.costing.workload import Workload

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])
_END_SECONDS = 30.0


class Worker:
    """A process that measures one model in one mode; ends with the `with` block, whatever happens.

    Args:
        subject: The model.
        mode: One of `workload.MODES`.
        workload: What is run; its device is the only one the process sees.
    """

    def __init__(self, subject: Subject, mode: str, workload: Workload) -> None:
        self._order = {"mode": mode, "workload": workload.to_dict()} | (
            {"folder": str(subject.folder)}
            if subject.folder
            else {"config": json.loads(subject.config.to_json_string(use_diff=False))}
        )
        self._environment = worker_environment(workload.device)
        if self._environment.get("CUDA_VISIBLE_DEVICES") and workload.device.startswith("cuda"):
            self._order["workload"] = workload.to_dict() | {"device": "cuda"}

    def __enter__(self) -> Worker:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gradpruner.evaluation.costing.worker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            text=True,
            encoding="utf-8",
        )
        self._say(json.dumps(self._order))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None and kind is not None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def wait_ready(self) -> None:
        """Waits until the model is loaded.

        Raises:
            ResourceError: If it could not be, as by every method here.
        """
        self._listen()

    def step(self) -> dict[str, float]:
        """Runs one step; returns its times by name, in seconds."""
        self._say("go")
        return self._listen()

    def finish(self) -> dict[str, Any]:
        """After the last step: `peak_bytes`, `empty_bytes` (the process before the model), `kind`."""
        return self._listen()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; listening says of what

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ResourceError(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ResourceError(str(reply["error"]))
        return reply

    def _last_words(self) -> str:
        """Why the process ended without an answer."""
        code = self._process.wait()
        if code == -9:
            return "The process was killed, most likely because memory ran out."
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return f"The process ended with code {code}: {lines[-1] if lines else 'no message'}"


def worker_environment(device: str) -> dict[str, str]:
    """Variables of a process that finds this package and sees one GPU: the one named, else the first.

    A Trainer that sees several spreads every batch over all of them.
    """
    environment = dict(os.environ)
    paths = [_PACKAGE_PARENT, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if device == "auto" or device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else []
        if visible is None or number < len(devices):
            environment["CUDA_VISIBLE_DEVICES"] = devices[number] if devices else str(number)
    return environment
