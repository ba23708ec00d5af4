"""Runs a script in two processes that form one world, as torchrun would, and gives back what each printed."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


def together(script, *arguments, size=2, timeout=900, expect=0):
    """The outputs of all ranks, in order; every rank must end with the exit code `expect`.

    Where that is not 0 the outputs are those on standard output and then those on standard error.

    Args:
        script: Python source.
        *arguments: Its `sys.argv[1:]`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared["PYTHONPATH"] = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.py"
        # As in conftest.py: what is imported is not looked through for garbage.
        path.write_text(f"import gc\ngc.disable()\n{script}", encoding="utf-8")
        ranks = [
            subprocess.Popen(
                [sys.executable, path, *map(str, arguments)],
                env=os.environ | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in range(size)
        ]
        try:
            found = [rank.communicate(timeout=timeout) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    for rank, (_, errors) in zip(ranks, found, strict=True):
        assert rank.returncode == expect, (rank.returncode, errors[-3000:])
    return [output + (errors if expect else "") for output, errors in found]
