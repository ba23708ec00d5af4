import errno
import hashlib
import json
import os
from itertools import accumulate, chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradpruner.common.errors import IntegrityError, ModelError
from gradpruner.models.headers import DTYPE_BYTES, read_header
from gradpruner.models.shards import INDEX_FILE, open_shards
from gradpruner.pruning import checked
from gradpruner.pruning import writer as packing
from gradpruner.pruning.pieces import TORCH_DTYPES, Piece, header_of, pack, shard_names
from gradpruner.pruning.writer import read_tensor, write_file, write_shards

METADATA = {"format": "pt"}
WORDS = {"F64": np.uint64, "F32": np.uint32, "BF16": np.uint16, "F16": np.uint16, "F8_E5M2": np.uint8,
         "F8_E4M3": np.uint8}  # fmt: skip
# Bits of +Inf (no such in E4M3), of the least and the largest NaN, of the largest finite value.
EXTREMES = {
    "F64": (0x7FF0 << 48, (0x7FF0 << 48) + 1, 2**63 - 1, (0x7FF0 << 48) - 1),
    "F32": (0x7F80_0000, 0x7F80_0001, 0x7FFF_FFFF, 0x7F7F_FFFF),
    "BF16": (0x7F80, 0x7F81, 0x7FFF, 0x7F7F),
    "F16": (0x7C00, 0x7C01, 0x7FFF, 0x7BFF),
    "F8_E5M2": (0x7C, 0x7D, 0x7F, 0x7B),
    "F8_E4M3": (0x7F, 0x7F, 0x7F, 0x7E),
}


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def stored(path, tensors):
    """A file of these tensors, and the pieces that would copy all of it."""
    save_file(tensors, path, METADATA)
    return [Piece.copied(name, ref) for name, ref in read_header(path).tensors.items()]


def from_bits(dtype, bits):
    array = np.array(bits, np.uint64).astype(WORDS[dtype])
    return torch.from_numpy(array.view(np.uint8)).view(TORCH_DTYPES[dtype])


def mixed_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{count}": (torch.rand(count, 3, generator=generator) * 100).to(dtype)
        for name, dtype in TORCH_DTYPES.items()
        for count in (1, 5)
    }
    return tensors | {
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "nöne\n": torch.zeros(3, 0).half(),
    }


# -- what goes into which file ---------------------------------------------------------------------------


@st.composite
def piece_lists(draw):
    entries = st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.integers(0, 12))
    pieces = []
    for index, (dtype, count) in enumerate(draw(st.lists(entries, max_size=30))):
        pieces.append(Piece(str(index), dtype, (count, 8), int(count * 8 * DTYPE_BYTES[dtype])))
    return pieces


@given(piece_lists(), st.integers(1, 600))
@settings(deadline=None, max_examples=150)
def test_files_are_within_the_limit_in_order_and_aligned(pieces, limit):
    files = pack(pieces, limit)
    numbers = [[int(piece.name) for piece in file] for file in files]
    assert list(chain.from_iterable(map(sorted, numbers))) == list(range(len(pieces)))
    for file in files:
        assert sum(piece.num_bytes for piece in file) <= limit or len(file) == 1
        offsets = accumulate((piece.num_bytes for piece in file), initial=0)
        for piece, offset in zip(file, offsets, strict=False):
            assert not piece.num_bytes or offset % max(1, int(DTYPE_BYTES[piece.dtype])) == 0
        for one, two in pairwise(file):
            assert (
                one.dtype != two.dtype
                or not min(one.num_bytes, two.num_bytes)
                or int(one.name) < int(two.name)
            )
    for file, following in pairwise(files):
        first = min(following, key=lambda piece: int(piece.name))
        assert sum(piece.num_bytes for piece in file) + first.num_bytes > limit


def test_names_of_files_are_those_of_transformers():
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_safetensors_reads_the_header(tmp_path):
    pieces = [
        Piece("ünï\n\"'", "F32", (2, 3), 24),
        Piece("scalar", "BF16", (), 2),
        Piece("none", "U8", (0, 7), 0),
    ]
    for metadata in (METADATA, {}, {"format": "pt", "ä": "\n"}):
        header = header_of(pieces, metadata)
        assert len(header) % 8 == 0
        (tmp_path / "a").write_bytes(header + bytes(26))
        with safe_open(tmp_path / "a", "pt") as file:
            assert set(file.keys()) == {piece.name for piece in pieces}
            assert file.metadata() == (metadata or None)
            assert [file.get_slice(p.name).get_shape() for p in pieces] == [[2, 3], [], [0, 7]]
        assert list(read_header(tmp_path / "a").tensors) == [piece.name for piece in pieces]


# -- copying ---------------------------------------------------------------------------------------------


def refuses(code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    return refuse


def at_most(function, limit, index):
    """The same system call, which moves a few bytes only; an odd number of them."""
    count = iter(range(1, 10**9))

    def few(*args):
        most = limit + 2 * (next(count) % 3)
        args = list(args)
        args[index] = min(args[index], most) if isinstance(args[index], int) else args[index][:most]
        return function(*args)

    return few


def five_bytes(file, views, start, read=os.preadv):
    return read(file, [views[0][:5]], start)


KERNELS = {
    "whole": {},
    "absent": {"copy_file_range": None},
    "another file system": {"copy_file_range": refuses(errno.EXDEV)},
    "not implemented": {"copy_file_range": refuses(errno.ENOSYS)},
    "network": {"copy_file_range": refuses(errno.EIO)},
    "nothing is copied": {"copy_file_range": lambda *args: 0},
    "odd counts": {"copy_file_range": at_most(os.copy_file_range, 7, 2)},
    "odd reads": {"copy_file_range": None, "preadv": five_bytes},
    "odd writes": {"copy_file_range": None, "write": at_most(os.write, 11, 1)},
}


def set_kernel(monkeypatch, calls):
    for name, call in calls.items():
        if call is None:
            monkeypatch.delattr(os, name)
        else:
            monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_file_has_the_same_bytes_however_it_is_copied(tmp_path, monkeypatch, kernel):
    pieces = stored(tmp_path / "source", mixed_tensors())
    (file,) = pack(pieces, 10**9)
    expected = (tmp_path / "source").read_bytes()
    data = b"".join(expected[p.ref.start : p.ref.stop] for p in file)
    steps = []
    set_kernel(monkeypatch, KERNELS[kernel])
    digest = write_file(tmp_path / "copy", file, METADATA, steps.append)
    monkeypatch.undo()
    assert (tmp_path / "copy").read_bytes() == header_of(file, METADATA) + data
    assert digest == hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest()
    assert sum(steps) == len(data) and min(steps) > 0


def test_blocks_of_any_size_give_the_same_file(tmp_path, monkeypatch):
    pieces = stored(tmp_path / "source", {"a": torch.randn(500), "b": torch.randn(300).half()})
    whole = write_file(tmp_path / "whole", pieces, METADATA)
    monkeypatch.setattr(packing, "_COPY_BYTES", 24)
    for where in (packing, checked):
        monkeypatch.setattr(where, "CHECK_BYTES", 56)
    assert write_file(tmp_path / "parts", pieces, METADATA) == whole
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert torch.equal(read_tensor(pieces[0].ref, finite=True), load_file(tmp_path / "source")["a"])


def test_renamed_computed_and_copied_tensors_from_several_files(tmp_path):
    sources = [{"a": torch.randn(4, 4), "b": torch.randn(4), "c": torch.randn(2)}, {"a": torch.arange(5)}]
    first, second = (stored(tmp_path / str(i), tensors) for i, tensors in enumerate(sources))
    made = torch.randn(3, 5).bfloat16()
    pieces = [
        Piece("x", "I64", (5,), 40, ref=second[0].ref),
        Piece("y", "F32", (2,), 8, ref=first[2].ref),
        Piece("z", "F32", (4, 4), 64, ref=first[0].ref),
        Piece("made", "BF16", (5, 3), 30, make=lambda: made.T),
        Piece("empty", "F16", (0, 2), 0, make=lambda: torch.empty(0, 2).half()),
    ]
    write_file(tmp_path / "out", pieces, METADATA)
    found = load_file(tmp_path / "out")
    expected = {"x": sources[1]["a"], "y": sources[0]["c"], "z": sources[0]["a"], "made": made.T}
    assert found.keys() == {*expected, "empty"} and found["empty"].shape == (0, 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_neighbours_are_copied_in_one_go(tmp_path, monkeypatch):
    pieces = stored(tmp_path / "source", {name: torch.randn(8) for name in "abcdef"})
    calls, copy = [], os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *args: calls.append(args[2:]) or copy(*args))
    write_file(tmp_path / "out", [p for p in pieces if p.name != "c"], METADATA)
    start = pieces[0].ref.start
    assert calls == [(64, start), (96, start + 96)]


def test_no_tensors_make_a_file_too(tmp_path):
    ((file,),) = (pack([], 100),)
    write_file(tmp_path / "out", file, METADATA)
    assert read_header(tmp_path / "out").tensors == {}


def test_several_files_get_an_index_that_transformers_and_we_read(tmp_path):
    pieces = stored(tmp_path / "source", {f"w{i}": torch.randn(4, i + 1) for i in range(9)})
    folder = tmp_path / "out"
    folder.mkdir()
    with checked.reading() as reader:
        written = [shard.result() for shard in write_shards(folder, pack(pieces, 250), METADATA, reader)]
    assert len(written) > 2 and {s.name for s in written} | {INDEX_FILE} == set(os.listdir(folder))
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(piece.num_bytes for piece in pieces)
    shards = open_shards(folder)
    assert index["weight_map"] == {name: ref.file.name for name, ref in shards.tensors.items()}
    assert shards.tensors.keys() == {piece.name for piece in pieces}
    for shard in written:
        content = (folder / shard.name).read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


# -- sources that are not what they were -----------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["whole", "absent"])
def test_a_source_that_became_shorter(tmp_path, monkeypatch, kernel):
    pieces = stored(tmp_path / "source", {"a": torch.randn(64)})
    os.truncate(tmp_path / "source", pieces[0].ref.stop - 10)
    set_kernel(monkeypatch, KERNELS[kernel])
    with pytest.raises(IntegrityError, match="source became shorter while it was read"):
        write_file(tmp_path / "out", pieces, METADATA)
    with pytest.raises(IntegrityError, match="source became shorter while it was read"):
        read_tensor(pieces[0].ref)


def test_a_source_that_is_gone_or_cannot_be_read_is_not_called_a_failure_to_write(tmp_path, monkeypatch):
    pieces = stored(tmp_path / "source", {"a": torch.randn(64)})
    set_kernel(monkeypatch, {"copy_file_range": None, "preadv": refuses(errno.EIO)})
    with pytest.raises(ModelError, match=r"source cannot be read: Input/output error\. Was it moved"):
        write_file(tmp_path / "out", pieces, METADATA)
    monkeypatch.undo()
    (tmp_path / "source").unlink()
    for work in (lambda: write_file(tmp_path / "out", pieces, METADATA), lambda: read_tensor(pieces[0].ref)):
        with pytest.raises(ModelError, match=r"source cannot be read: No such file"):
            work()


def test_an_error_while_writing_stays_what_it_is(tmp_path, monkeypatch):
    pieces = stored(tmp_path / "source", {"a": torch.randn(64)})
    set_kernel(monkeypatch, {"copy_file_range": refuses(errno.ENOSPC), "write": refuses(errno.ENOSPC)})
    with pytest.raises(OSError) as caught:
        write_file(tmp_path / "out", pieces, METADATA)
    assert caught.value.errno == errno.ENOSPC


def test_what_reads_back_shorter_than_it_was_written_is_refused(tmp_path, monkeypatch):
    pieces = stored(tmp_path / "source", {"a": torch.randn(64)})
    monkeypatch.setattr(os, "copy_file_range", lambda source, out, count, start: count)
    with pytest.raises(IntegrityError, match="out is shorter than what was written to it"):
        write_file(tmp_path / "out", pieces, METADATA)


# -- values ----------------------------------------------------------------------------------------------


def test_every_pattern_of_the_short_floats_is_judged_as_torch_judges_it():
    scratch = np.empty(8, np.uint8)
    for dtype in ("F8_E5M2", "F8_E4M3", "BF16", "F16"):
        bits = np.arange(2 ** (8 * WORDS[dtype]().itemsize)).astype(WORDS[dtype])
        values = from_bits(dtype, bits).float()
        found = [
            checked.holds_non_finite(word, dtype, scratch)
            for word in bits.view(np.uint8).reshape(len(bits), -1)
        ]
        assert found == (~torch.isfinite(values)).tolist()


@pytest.mark.parametrize("dtype", WORDS)
def test_the_largest_and_the_smallest_values_are_accepted(tmp_path, dtype):
    sign = 1 << (8 * WORDS[dtype]().itemsize - 1)
    largest = EXTREMES[dtype][3]
    bits = [0, sign, 1, sign | 1, largest, sign | largest]
    tensors = {
        "a": from_bits(dtype, bits),
        "int": torch.full((16,), -1),
        "bool": torch.ones(3, dtype=torch.bool),
    }
    (file,) = pack(stored(tmp_path / "source", tensors), 10**6)
    write_file(tmp_path / "out", file, METADATA)
    read = read_tensor(next(piece.ref for piece in file if piece.name == "a"), finite=True)
    assert torch.equal(read.view(torch.uint8), tensors["a"].view(torch.uint8))


@pytest.mark.parametrize("dtype", WORDS)
def test_nan_and_inf_are_found_wherever_they_are(tmp_path, monkeypatch, dtype):
    for where in (packing, checked):
        monkeypatch.setattr(where, "CHECK_BYTES", 64)  # so that 100 entries span several blocks
    monkeypatch.setattr(packing, "_COPY_BYTES", 67)  # so that what is written ends inside words
    sign = 1 << (8 * WORDS[dtype]().itemsize - 1)
    for number, place in enumerate((0, 99, 50, 7, 8, 63, 64)):
        for bad in EXTREMES[dtype][:3]:
            bits = [1] * 100
            bits[place] = bad | (sign if number % 2 else 0)
            tensors = {
                "before": torch.randn(9),
                "sick": from_bits(dtype, bits),
                "then": torch.zeros(5).bfloat16(),
            }
            pieces = stored(tmp_path / "source", tensors)
            renamed = [Piece(f"new.{p.name}", p.dtype, p.shape, p.num_bytes, ref=p.ref) for p in pieces]
            with pytest.raises(IntegrityError, match=r"tensor 'sick' in .*source holds NaN or Inf.*damaged"):
                write_file(tmp_path / "out", pack(renamed, 10**6)[0], METADATA)
            with pytest.raises(IntegrityError, match="'sick'"):
                read_tensor(next(p.ref for p in pieces if p.name == "sick"), finite=True)


def test_complex_numbers_are_looked_at_too(tmp_path):
    (piece,) = stored(tmp_path / "source", {"a": torch.tensor([1 + 1j, complex(0, float("nan"))])})
    with pytest.raises(IntegrityError, match="'a'"):
        write_file(tmp_path / "out", [piece], METADATA)


def test_a_computed_tensor_that_overflows_is_not_blamed_on_the_source(tmp_path):
    huge = torch.tensor([1e30]).half()
    with pytest.raises(IntegrityError, match=r"'w' became NaN or Inf when it was computed.*norm_preserving"):
        write_file(tmp_path / "out", [Piece("w", "F16", (1,), 2, make=lambda: huge)], METADATA)


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 5, 7])
def test_a_foreign_header_need_not_be_aligned(tmp_path, monkeypatch, shift):
    for where in (packing, checked):
        monkeypatch.setattr(where, "CHECK_BYTES", 61)
    monkeypatch.setattr(packing, "_COPY_BYTES", 3)
    # Read at a wrong place, the bytes of each of these are NaN of some dtype.
    tensors = {
        "f32": from_bits("F32", [0x00FFFFFF] * 50),
        "bf16": from_bits("BF16", [0x00FF] * 90),
        "u8": torch.full((13,), 255, dtype=torch.uint8),
        "f64": from_bits("F64", [0x00FF_FFFF_FFFF_FFFF] * 30),
    }
    save_file(tensors, tmp_path / "source", METADATA)
    refs = read_header(tmp_path / "source").tensors
    pieces = [Piece.copied(name, refs[name]) for name in tensors]
    text = header_of(pieces, {})[8:].rstrip() + b" " * shift
    header = len(text).to_bytes(8, "little") + text
    digest = write_file(tmp_path / "out", pieces, {}, header=header)
    expected = header + b"".join(raw_bytes(tensor) for tensor in tensors.values())
    assert (tmp_path / "out").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()
    tensors["f64"][-1] = float("nan")
    save_file(tensors, tmp_path / "source", METADATA)
    with pytest.raises(IntegrityError, match="'f64'"):
        write_file(tmp_path / "out", pieces, {}, header=header)


def test_reading_a_tensor_gives_what_safetensors_gives(tmp_path):
    tensors = mixed_tensors()
    for piece in stored(tmp_path / "source", tensors):
        found = read_tensor(piece.ref)
        assert (found.dtype, found.shape) == (tensors[piece.name].dtype, tensors[piece.name].shape)
        assert raw_bytes(found) == raw_bytes(tensors[piece.name])
        found.zero_()  # memory of its own
