"""Random damage to safetensors headers and weight indexes: our reader against safetensors' own parser.

    python benchmarks/fuzz_shards.py --cases 1000000 --seed 0 --json out.json
    python benchmarks/fuzz_shards.py --first 4711 --cases 1 --seed 0          one case again

A case fails if `read_header` or `open_shards` raises anything but our errors or takes a second of processor
time; if it accepts what safetensors refuses or reads differently, down to the bytes of each tensor; or if it
refuses what safetensors accepts for a reason that is not one of `STRICTER`. Case n of a seed is always the
same. tests/test_shards.py runs ten thousand of them.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

from safetensors import SafetensorError, deserialize, safe_open

from gradpruner.errors import GradPrunerError
from gradpruner.models.shards import DTYPE_BYTES, INDEX_FILE, open_shards, read_header
from gradpruner.provenance import provenance

SECONDS = 1.0
# What safetensors accepts and we refuse, each on purpose. A part of our message, and why.
STRICTER = {
    "is there twice": "parsers differ on which of two equal keys counts",
    "once each and nothing else": "a field that safetensors ignores",
    "does not begin its dtype, shape": "an entry that is no flat object: a list, or an unknown nested field",
    "its entry has a -0": "in a field that safetensors ignores; it refuses a -0 that it reads",
    "4096 are allowed": "an entry of kilobytes",
    "does not begin a JSON object": "__metadata__ is null",
    "the name is empty": "no tensor of a model has an empty name",
    "counts": "a rank over 64, or an extent of 2^63 and more beside a 0",
    "more elements than can be counted": "2^63 elements and more, times 0",
}


class Raw(str):
    """Text that stands in JSON as it is."""


class Members(list[tuple[Any, Any]]):
    """A JSON object that may name a key twice."""


NUMBERS = [-1, 0, 1, 2, 7, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
WORDS = ["", "F32", "U8", "F4", "f32", "F8_E8M0", None, True, False]
# As text, so that no case can change what the next one gets.
LISTS = ["[]", "[0]", "[0,0]", "[0,1]", "[[]]", "[null]", "{}", '{"U8":null}', '["U8",[1],[0,1]]']
NO_COUNTS = ["-0", "1.0", "1e3", "1e999", "NaN", "-Infinity", "01", "+1", "0x1", "1" * 5000]
NO_JSON = ["", "tru", "/**/1", r'"\ud800"', r'"\ud83d\ude00"', r'"\u0000"', r'"\q"', '"\x01"', '"\x7f"']
DEEP = ["[" * 40 + "]" * 40, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "0" + "}" * 3000]
ODD: list[Any] = [*NUMBERS, *WORDS, *map(Raw, (*LISTS, *NO_COUNTS, *NO_JSON, *DEEP))]
NAMES = ["w", "layers.0.w", "ü", "😀", 'a"b', "a\\b", "a\nb", "a\x00", " ", "\x7f", "{", "}", "]", "null"]
PATHS = [
    "../out",
    "/etc/x",
    "/tmp/x",
    "./a",
    "sub/a",
    "sub\\a",
    "C:a",
    "a\x00",
    "a\n",
    "",
    "..",
    "ü",
    "a" * 300,
]
SHARD_NAMES = [
    *("a.safetensors", "b.safetensors", "link.safetensors", "out.safetensors", "gone.safetensors"),
    *("a.safetensors/", "..", ".", "", "/etc/passwd", *(f"{path}.safetensors" for path in PATHS)),
]
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+|\s+|"')


# -- making cases ----------------------------------------------------------------------------------------


def render(value: Any, rng: Random) -> str:
    """JSON text, sometimes with spaces."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Members):
        gap = rng.choice(("", "", "", " ", "\n\t"))
        inner = [f"{render(key, rng)}{gap}:{gap}{render(item, rng)}" for key, item in value]
        return f"{{{gap}{f',{gap}'.join(inner)}}}"
    if isinstance(value, list):
        return f"[{', '.join(render(item, rng) for item in value)}]"
    if type(value) is int:
        return str(value)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def sound_header(rng: Random) -> tuple[Members, int]:
    """A header without fault, in any order, and how many bytes of data it describes."""
    header, offset = Members(), 0
    for number in range(rng.randrange(6)):
        dtype = rng.choice(list(DTYPE_BYTES))
        shape = [rng.randrange(rng.choice((2, 4, 6))) for _ in range(rng.randrange(4))]
        if DTYPE_BYTES[dtype] < 1:
            shape.append(4)  # whole bytes
        size = DTYPE_BYTES[dtype]
        for extent in shape:
            size *= extent
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [offset, offset + int(size)])]
        rng.shuffle(fields)
        header.append((f"{rng.choice(NAMES)}{number}", Members(fields)))
        offset += int(size)
    if rng.random() < 0.4:
        strings = [(f"{rng.choice(NAMES)}{n}", rng.choice(NAMES)) for n in range(rng.randrange(3))]
        header.append(("__metadata__", Members(strings)))
    rng.shuffle(header)
    return header, offset


def damage_members(members: Members, rng: Random) -> None:
    """One change of structure to an object, or to something in it."""
    inner = [value for _, value in members if isinstance(value, (Members, list)) and value]
    if inner and rng.random() < 0.75:
        chosen = rng.choice(inner)
        return damage_members(chosen, rng) if isinstance(chosen, Members) else damage_list(chosen, rng)
    at = rng.randrange(len(members) + 1)
    key = rng.choice(("", "__metadata__", "dtype", "shape", "weight_map", *NAMES))
    if at == len(members) or rng.random() < 0.15:
        members.insert(at, (key, rng.choice(ODD)))
        return None
    name, value = members[at]
    change = rng.randrange(6)
    if change == 0:
        del members[at]
    elif change == 1:
        members.insert(rng.randrange(len(members) + 1), members[at])
    elif change == 2:
        members[at] = (rng.choice((key, rng.choice(ODD), members[0][0])), value)
    elif change == 3:
        other = rng.randrange(len(members))
        members[at], members[other] = (name, members[other][1]), (members[other][0], value)
    else:
        members[at] = (name, rng.choice((*ODD, *SHARD_NAMES, *DTYPE_BYTES)))
    return None


def damage_list(items: list[Any], rng: Random) -> None:
    at = rng.randrange(len(items))
    change = rng.randrange(6)
    if change == 0:
        del items[at]
    elif change == 1:
        items.insert(at, rng.choice(ODD))
    elif change == 2:
        items.reverse()
    elif change == 3:
        items.extend([rng.choice((0, 1))] * rng.choice((1, 1, 60, 60, 70, 70, 3000)))
    elif isinstance(items[at], int) and change == 4:
        items[at] += rng.choice((-1, 1, 2, -8))
    else:
        items[at] = rng.choice(ODD)


def damage_tokens(text: str, rng: Random) -> str:
    tokens = TOKEN.findall(text)
    for _ in range(rng.randrange(1, 4)):
        if not tokens:
            break
        at, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        change = rng.randrange(4)
        if change == 0:
            del tokens[at]
        elif change == 1:
            tokens.insert(at, tokens[other])
        elif change == 2:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        else:
            tokens[at] = render(rng.choice(ODD), rng)
    return "".join(tokens)


def damage_bytes(raw: bytes, rng: Random, within: int | None = None) -> bytes:
    """Up to four bytes changed, lost, added or copied among the first `within`."""
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(min(len(changed), within or len(changed)) + 1)
        change = rng.randrange(5)
        if change == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif change == 1 and at < len(changed):
            changed[at] = rng.choice(b'"\\{}[],:0123456789-+.eE \n\x00\x7f\x80\xc0\xed\xff')
        elif change == 2:
            del changed[at : at + rng.choice((1, 1, 2, 9))]
        elif change == 3:
            changed[at:at] = rng.choice((b" ", b"0", b'"', b"\x00", b"\xef\xbb\xbf", rng.randbytes(3)))
        else:
            changed[at:at] = changed[max(0, at - 20) : at]
    return bytes(changed)


def as_file(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def damaged_length(raw: bytes, rng: Random) -> bytes:
    """A wrong length of the header, or a file that is too short or too long."""
    length = int.from_bytes(raw[:8], "little")
    near = [length - 1, length + 1, len(raw) - 8, len(raw) - 7, len(raw), 0, 1, 2]
    far = [99_999_999, 100_000_000, 100_000_001, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, rng.getrandbits(64)]
    change = rng.randrange(4)
    if change == 0:
        return max(0, rng.choice(near)).to_bytes(8, "little") + raw[8:]
    if change == 1:
        return rng.choice(far).to_bytes(8, "little") + raw[8:]
    return raw[: rng.randrange(len(raw))] if change == 2 else raw + rng.randbytes(rng.randrange(1, 20))


def make_file(kind: str, rng: Random) -> bytes:
    """The bytes of a safetensors file with damage of one kind ("sound": without)."""
    header, size = sound_header(rng)
    data = rng.randbytes(size)
    if kind == "structure":
        for _ in range(rng.randrange(1, 4)):
            damage_members(header, rng)
        if rng.random() < 0.1:
            data = data[: rng.randrange(size + 1)] if rng.random() < 0.5 else data + b"more"
    text = render(header, rng) + " " * rng.choice((0, 0, 1, 7))
    if kind == "tokens":
        text = damage_tokens(text, rng)
    raw = text.encode("utf-8", "surrogatepass")
    if kind == "text":
        raw = damage_bytes(raw, rng)
    file = as_file(raw, data)
    if kind == "bytes":
        file = damage_bytes(file, rng, within=rng.choice((8, 8 + len(raw), len(file))))
    return damaged_length(file, rng) if kind == "length" else file


FILE_KINDS = ("sound", "structure", "structure", "tokens", "text", "bytes", "length")


def make_index(kind: str, keys: dict[str, list[str]], rng: Random) -> bytes:
    """The bytes of an index of the shards a and b ("index": damaged; "sound index": not)."""
    pairs = [(name, shard) for shard in ("a.safetensors", "b.safetensors") for name in keys[shard]]
    if rng.random() < 0.3:
        pairs = [(name, shard.replace("a.", "link.")) for name, shard in pairs]
    rng.shuffle(pairs)
    total = Members([("total_size", rng.choice(NUMBERS))])
    index = Members([("metadata", total), ("weight_map", Members(pairs))])
    if kind == "sound index":
        return render(index, rng).encode()
    how = rng.randrange(4)
    if how == 0:
        weight_map = index[1][1]
        at = rng.randrange(len(weight_map))
        weight_map[at] = (weight_map[at][0], rng.choice(SHARD_NAMES))
    elif how == 1:
        for _ in range(rng.randrange(1, 3)):
            damage_members(index, rng)
    text = render(index, rng)
    raw = (damage_tokens(text, rng) if how == 2 else text).encode("utf-8", "surrogatepass")
    return damage_bytes(raw, rng) if how == 3 else raw


# -- judging them ----------------------------------------------------------------------------------------


def attempt(work: Callable[[], Any]) -> tuple[Any, str, str]:
    """What our reader returned, its refusal, and what is wrong with the way it behaved."""
    start, result, refusal, fault = time.thread_time(), None, "", ""
    try:
        result = work()
    except GradPrunerError as error:
        refusal = str(error)
        if len(refusal) > 2000 or not refusal.isprintable():
            fault = "a message that is too long or not printable"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        fault = f"raised {type(error).__name__}: {error}"
    seconds = time.thread_time() - start
    return result, refusal, fault or (f"took {seconds:.2f} s" if seconds > SECONDS else "")


def judge_file(path: Path, raw: bytes) -> tuple[str, str]:
    """Outcome ("both accept", ...) and fault ("" if none) of one safetensors file."""
    header, refusal, fault = attempt(lambda: read_header(path))
    theirs: dict[str, Any] | None = None
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            slices = ((name, file.get_slice(name)) for name in names)
            theirs = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices}
    except (SafetensorError, OSError, ValueError):
        pass
    if fault:
        return "fault", fault
    if header is None:
        if theirs is None:
            return "both refuse", ""
        known = next((part for part in STRICTER if part in refusal), None)
        return (f"only we refuse: {known}", "") if known else ("fault", f"refuses a sound file: {refusal}")
    if theirs is None:
        return "fault", "accepts what safetensors refuses"
    ours = {ref.name: (ref.dtype, ref.shape) for ref in header.tensors.values()}
    data = {name: bytes(entry["data"]) for name, entry in deserialize(raw)}  # type: ignore[no-untyped-call]
    if ours != theirs or header.metadata != metadata:
        return "fault", "reads other tensors or metadata than safetensors"
    if any(raw[ref.start : ref.stop] != data[name] for name, ref in header.tensors.items()):
        return "fault", "reads other bytes than safetensors"
    return "both accept", ""


def reference_index(raw: bytes, keys: dict[str, list[str]]) -> dict[str, str] | None:
    """The weight map if it is right, by the plainest means; None if it is not."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        index = json.loads(raw.decode(), object_pairs_hook=unique)
        "".join(index).encode()  # refuses halves of surrogate pairs
        weight_map: dict[str, str] = index["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    inside = {"a.safetensors", "b.safetensors", "link.safetensors"}
    if not shards or not shards <= inside or {"a.safetensors", "link.safetensors"} <= shards:
        return None
    return weight_map if weight_map == {name: shard for shard in shards for name in keys[shard]} else None


def judge_index(folder: Path, raw: bytes, keys: dict[str, list[str]]) -> tuple[str, str]:
    """The same for an index; the reference is the list of keys that safetensors finds in each shard."""
    shards, refusal, fault = attempt(lambda: open_shards(folder))
    expected = reference_index(raw, keys)
    if fault:
        return "fault", fault
    if shards is None:
        return ("both refuse", "") if expected is None else ("fault", f"refuses a sound index: {refusal}")
    found = {name: ref.file.name for name, ref in shards.tensors.items()}
    return ("both accept", "") if found == expected else ("fault", "accepts an index that is wrong")


# -- running ---------------------------------------------------------------------------------------------


def scratch() -> AbstractContextManager[str]:
    """A folder in memory where there is one: a disk would be most of the time."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="shards-", dir=memory if memory.is_dir() else None)


def make_folder(place: Path) -> tuple[Path, dict[str, list[str]]]:
    """A model folder with shards a and b, a link to a, a link to the outside, and the keys of each."""
    folder = place / "model"
    folder.mkdir()
    keys = {}
    for shard, names in (("a", "pqr"), ("b", "stu"), ("../out", "v")):
        header = {
            name: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for at, name in enumerate(names)
        }
        path = folder / f"{shard}.safetensors"
        path.write_bytes(as_file(json.dumps(header).encode(), names.encode()))
        with safe_open(path, "np") as file:
            keys[path.name] = list(file.keys())
    (folder / "link.safetensors").symlink_to("a.safetensors")
    (folder / "out.safetensors").symlink_to("../out.safetensors")
    return folder, {**keys, "link.safetensors": keys["a.safetensors"]}


def run(cases: int, seed: int, place: Path, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Runs cases `first` to `first + cases` with files in `place`.

    Returns:
        How many had which outcome, by "kind: outcome", and a line for each that failed.
    """
    counts: Counter[str] = Counter()
    failures = []
    folder, keys = make_folder(place)
    for number in range(first, first + cases):
        rng = Random(f"{seed}/{number}")
        kind = rng.choices((*FILE_KINDS, "index", "sound index"), (10, 10, 10, 16, 16, 16, 8, 12, 2))[0]
        if "index" in kind:
            raw = make_index(kind, keys, rng)
            (folder / INDEX_FILE).write_bytes(raw)
            outcome, fault = judge_index(folder, raw, keys)
        else:
            raw = make_file(kind, rng)
            (place / "case.safetensors").write_bytes(raw)
            outcome, fault = judge_file(place / "case.safetensors", raw)
        if not fault and "sound" in kind and outcome != "both accept":
            outcome, fault = "fault", "a sound file is refused"
        counts[f"{kind}: {outcome}"] += 1
        if fault:
            failures.append(f"case {number} ({kind}): {fault}: {raw[:300]!r}")
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--json", type=Path, help="write the counts here")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    failures: list[str] = []
    start, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for first in range(args.first, args.first + args.cases, 50_000):
        part = min(50_000, args.first + args.cases - first)
        with scratch() as place:
            new_counts, new_failures = run(part, args.seed, Path(place), first)
        counts += new_counts
        failures += new_failures
        done, seconds = first + part - args.first, time.perf_counter() - start
        print(f"{done} cases, {done / seconds:.0f} per second, {len(failures)} failures", flush=True)
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    for name, count in sorted(counts.items()):
        print(f"{count:9d}  {name}")
    print(*failures[:20], sep="\n")
    if args.json:
        result = {
            "what": "gradpruner.models.shards against safetensors on randomly damaged headers and indexes",
            "config": {"cases": args.cases, "seed": args.seed, "first": args.first},
            "failures": len(failures),
            "first_failures": failures[:20],
            "cases_per_second": round(args.cases / seconds),
            "memory_rise_bytes": rise * 1024,
            "counts": dict(sorted(counts.items())),
            "provenance": provenance(args.seed),
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
