"""Python scripts in processes of their own, forked from one that has imported the package already.

A fresh interpreter would spend some five seconds on imports each time.
"""

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

COMMAND = "from gradpruner.cli.main import main; main()"
"""The command line; its arguments are those of `gradpruner`."""
RUN_PATH = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A file and its arguments, as after `python`."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "gradpruner.cli.main",
        "gradpruner.methods",
        "gradpruner.runs.pipeline",
        "peft",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
    ]
)


def _carry_out(script, arguments, environment, outputs):
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    gc.freeze()  # as in conftest.py: what is imported is not looked through for garbage
    torch.set_num_threads(1)
    sys.argv = ["script", *arguments]
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})


def begin(script, *arguments, outputs, **environment):
    """Begins a script in a process of its own and gives back the process.

    Args:
        script: Python source.
        *arguments: Its `sys.argv[1:]`.
        outputs: Files for what it prints: standard output and standard error.
        **environment: Added to its environment.
    """
    environment = {name: str(value) for name, value in environment.items()}
    process = _FORKS.Process(
        target=_carry_out, args=(script, [*map(str, arguments)], environment, [*map(str, outputs)])
    )
    process.start()
    return process


def _all_ended(script, arguments, environments, timeout):
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder) / f"{kind}-{i}" for kind in "oe"] for i in range(len(environments))]
        pairs = zip(files, environments, strict=True)
        processes = [begin(script, *arguments, outputs=paths, **more) for paths, more in pairs]
        try:
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
        said = [[path.read_text(encoding="utf-8") for path in paths] for paths in files]
    return [(process.exitcode, *both) for process, both in zip(processes, said, strict=True)]


def ended(script, *arguments, timeout=600):
    """Runs a script to its end: its exit code, standard output and standard error."""
    return _all_ended(script, arguments, [{}], timeout)[0]


def together(script, *arguments, size=2, timeout=900, expect=0):
    """Runs a script in processes that form one world, as torchrun would; their outputs in order of rank.

    Every rank must end with the exit code `expect`. Where that is not 0 the outputs are those on standard
    output and then those on standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = _all_ended(
        script, arguments, [shared | {"RANK": r, "LOCAL_RANK": r} for r in range(size)], timeout
    )
    for code, _, errors in found:
        assert code == expect, (code, errors[-3000:])
    return [output + (errors if expect else "") for _, output, errors in found]
