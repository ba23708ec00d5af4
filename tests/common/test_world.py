import json
import os
from pathlib import Path

import pytest
from processes import together

from gradpruner.common.errors import ConfigError
from gradpruner.common.world import PeerError, World, this_world

SCRIPT = """
import json, sys, time
import torch
from gradpruner.common.errors import DataError
from gradpruner.common.world import GoneError, PeerError, this_world

world = this_world()
found = {"rank": world.rank, "size": world.size}
found["agreed"] = world.agreed(lambda: {"said by": world.rank})
found["gathered"] = world.gathered([world.rank] * (2 - world.rank))
found["in order"] = world.in_order([i * i for i in world.share(5)])


def refuse():
    raise DataError("No rows.", hint="Give some.")


try:
    world.agreed(refuse)
except (DataError, PeerError) as error:
    found["error"] = [type(error).__name__, str(error), error.exit_code]


def fail(*ranks):
    if world.rank in ranks:
        raise DataError(f"NaN on {world.rank}.")
    return "done"


found["steps"] = []
for ranks in ((), (0, 1), (1,), ()):
    try:
        found["steps"].append(world.in_step(lambda: fail(*ranks)))
    except (DataError, PeerError) as error:
        found["steps"].append(str(error))


def long_work():
    fail(1)
    for _ in range(600):
        world.stop_if_peer_failed()
        time.sleep(0.1)


sums = torch.tensor([1.0, world.rank])
world.sum_on_first([sums])
found["sums"] = sums.tolist()
began = time.perf_counter()
try:
    world.in_step(long_work)
except (DataError, PeerError) as error:
    found["heeded"] = str(error), time.perf_counter() - began < 30


def leave():
    if world.rank == 1:
        print(json.dumps(found), flush=True)
        raise SystemExit(143)
    world.gathered([1])


try:
    world.in_step(leave)
except GoneError as error:
    found["gone"] = error.message, error.exit_code
    print(json.dumps(found))
    sys.exit(error.exit_code)
"""


def test_two_processes_work_together_and_hear_of_each_other_s_end():
    first, second = (json.loads(said.splitlines()[0]) for said in together(SCRIPT, expect=143))
    assert (first["rank"], second["rank"]) == (0, 1)
    for found in (first, second):
        assert found["size"] == 2
        assert found["agreed"] == {"said by": 0}
        assert found["gathered"] == [0, 0, 1]
        assert found["in order"] == [0, 1, 4, 9, 16]
    went_on = "Another process stopped: NaN on 1."
    assert first["steps"] == ["done", "NaN on 0.", went_on, "done"]
    assert second["steps"] == ["done", "NaN on 1.", "NaN on 1.", "done"]
    assert first["error"] == ["DataError", "No rows. Give some.", 3]
    assert second["error"] == ["PeerError", "Another process stopped: No rows. Give some.", 3]
    assert first["sums"] == [2.0, 1.0]
    assert first["heeded"] == [went_on, True] and second["heeded"] == ["NaN on 1.", True]
    assert first["gone"] == [
        "Another process was interrupted. Start the same command again to continue.",
        143,
    ]


ALONE = """
import sys
from datetime import timedelta
sys.path.insert(0, sys.argv[1])
from builders import make_llama, make_samples
import gradpruner.common.world as module
from gradpruner.data.encoding import Collator
from gradpruner.common.progress import set_mode
from gradpruner.training.finetuning import finetune

set_mode("quiet")
module.GRACE = timedelta(seconds=2)
world = module.this_world()


class Rows(list):
    reads = 0

    def __getitem__(self, index):
        self.reads += world.rank
        if self.reads > 2:  # in the second step of the second process
            raise FileNotFoundError(2, "No such file", "/rows")
        return super().__getitem__(index)


def train():
    options = dict(batch_size=2, accumulation=1, epochs=4, batching="padded", device="cpu", save_steps=None)
    finetune(make_llama(), Rows(make_samples(8)), collator=Collator(), **options)


try:
    world.in_step(train)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(getattr(error, "exit_code", 5))
"""


def test_an_error_that_one_process_meets_alone_in_training_ends_both_with_one_code():
    first, second = together(ALONE, Path(__file__).parent, timeout=120, expect=5)
    assert second.startswith("FileNotFoundError: [Errno 2] No such file: '/rows'")
    assert first.startswith("GoneError: Another process stopped: '/rows' cannot be used: No such file.")


def test_alone_nothing_is_exchanged():
    world = World()
    assert world.is_first
    assert world.agreed(lambda: 3) == 3
    assert world.gathered((1, 2)) == [1, 2]
    assert list(world.share(3)) == [0, 1, 2]
    assert world.in_order(["a", "b"]) == ["a", "b"]
    with pytest.raises(ZeroDivisionError):
        world.agreed(lambda: 1 / 0)


def test_half_a_launcher_is_refused(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    this_world.cache_clear()
    with pytest.raises(ConfigError, match="not set: RANK, MASTER_ADDR, MASTER_PORT"):
        this_world()
    monkeypatch.setitem(os.environ, "MASTER_PORT", "0")
    with pytest.raises(ConfigError, match="the processes cannot connect"):
        this_world()
    monkeypatch.delitem(os.environ, "WORLD_SIZE")
    assert this_world() == World()
    this_world.cache_clear()


def test_a_peer_error_survives_the_journey():
    import pickle

    error = PeerError("It stopped.", hint="Look there.")
    error.exit_code = 3
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.hint, copy.exit_code) == ("It stopped. Look there.", "Look there.", 3)
