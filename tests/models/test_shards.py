import json
import os
import shutil
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from gradpruner.common.errors import IntegrityError, ModelError
from gradpruner.models import headers
from gradpruner.models.headers import DTYPE_BYTES, check_inside, read_header
from gradpruner.models.shards import open_shards

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


def entry(dtype="U8", shape=(1,), start=0, stop=1):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def write(path, header, data=b"\x00", length=None):
    """A safetensors file with this header, a value or JSON text, whether it makes sense or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def stored(ref):
    with ref.file.open("rb") as file:
        file.seek(ref.start)
        return file.read(ref.num_bytes)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def refusal(path, root=None):
    with pytest.raises(IntegrityError) as caught:
        read_header(path, root)
    assert caught.value.hint and caught.value.message.endswith(".")
    return caught.value.message


# -- files that are as they should be --------------------------------------------------------------------


def test_what_safetensors_writes_is_read_to_the_byte(tmp_path):
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "ünïcode": torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "ä": "\n"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt", "ä": "\n"}
    assert header.file_bytes == (tmp_path / "a.safetensors").stat().st_size
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        ref = header.tensors[name]
        assert (ref.name, ref.file, ref.shape) == (name, header.path, tuple(tensor.shape))
        assert ref.dtype == (name if name in TORCH_DTYPES else "F32")
        assert stored(ref) == raw_bytes(tensor)
    refs = list(header.tensors.values())
    assert (refs[0].start, refs[-1].stop) == (header.data_start, header.file_bytes)
    assert all(before.stop == after.start for before, after in pairwise(refs))


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype_takes_as_many_bytes_as_for_safetensors(tmp_path, dtype):
    size = int(DTYPE_BYTES[dtype] * 4)
    path = write(tmp_path / "a.safetensors", {"a": entry(dtype, [4], 0, size)}, b"\x00" * size)
    assert read_header(path).tensors["a"].num_bytes == size


def test_no_tensors_at_all(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert (header.tensors, header.metadata, header.data_start) == ({}, {}, header.file_bytes)


def test_order_is_that_of_the_data_and_empty_tensors_take_no_place(tmp_path):
    header = {"b": entry(start=1, stop=2), "z": entry(shape=[0], start=1), "a": entry(), "__metadata__": {}}
    text = json.dumps(header, indent=3).encode() + b" \n"
    path = write(tmp_path / "a.safetensors", text, b"ab")
    assert [(n, stored(ref)) for n, ref in read_header(path).tensors.items()] == [
        *(("a", b"a"), ("z", b""), ("b", b"b"))
    ]


def test_escaped_names_are_the_names(tmp_path):
    path = write(tmp_path / "a.safetensors", rb'{"\u0061\ud83d\ude00\n":%s}' % json.dumps(entry()).encode())
    assert list(read_header(path).tensors) == ["a😀\n"]


def test_more_tensors_than_sixteen_bits_count(tmp_path):
    many = {f"layers.{i}.weight": entry(start=i, stop=i + 1) for i in range(70_000)}
    path = write(tmp_path / "a.safetensors", many, bytes(70_000))
    assert len(read_header(path).tensors) == 70_000


@pytest.mark.parametrize("size", [3 * 2**30, 5 * 2**30, 2**42])
def test_files_far_larger_than_memory(tmp_path, size):
    path = write(tmp_path / "a.safetensors", {"a": entry(shape=[2, size // 2], stop=size)}, b"")
    os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    start = time.process_time()
    ref = read_header(path).tensors["a"]
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (ref.num_bytes, ref.stop) == (size, path.stat().st_size)
    assert seconds < 1 and peak < 1_000_000
    os.truncate(path, size)
    assert "is damaged or cut off" in refusal(path)


# -- files that are not ----------------------------------------------------------------------------------

GOOD = json.dumps(entry())
# Headers over one byte of data; safetensors says what is wrong with them.
BAD_HEADERS = [
    *(b"", b"[]", b"null", b'{"a":', b'{"\xff":1}', rb'{"\ud800":1}'),
    *('{"a":%s,}', '{"a":%s}x', "{a:%s}"),
    {"__metadata__": {"a": 1}, "a": entry()},
    {"a": {"dtype": "U8", "shape": [1]}},
    {"a": entry(dtype="F33")},
    {"a": entry(shape=[-1])},
    {"a": entry(shape=[1.0])},
    {"a": entry(shape=[2**40, 2**40], stop=0)},
    {"a": entry("F64", shape=[2**62])},
    {"a": entry(shape=[2])},
    {"a": entry(start=1, stop=0)},
    {"a": entry(start=2**62, stop=2**62 + 1)},
    {"a": entry(shape=[2], stop=2)},
    {"a": entry(shape=[0], stop=0)},
    {"a": entry(), "b": entry()},
    {},
]


@pytest.mark.parametrize("header", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_headers_that_do_not_add_up(tmp_path, header):
    text = header.replace("%s", GOOD).encode() if isinstance(header, str) else header
    message = refusal(write(tmp_path / "a.safetensors", text))
    assert message.startswith(f"{tmp_path / 'a.safetensors'} is damaged or cut off: ")
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize("size", range(8))
def test_files_too_short_for_a_length(tmp_path, size):
    (tmp_path / "a.safetensors").write_bytes(bytes(size))
    assert f"has {size} bytes; a safetensors file has at least 8" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**62, 2**64 - 1])
def test_lengths_that_no_header_has(tmp_path, length):
    path = write(tmp_path / "a.safetensors", {"a": entry()}, length=length)
    os.truncate(path, 2**33)  # there would be so many bytes
    tracemalloc.start()
    start = time.process_time()
    assert f"claims a header of {length} bytes; at most 100000000 are allowed" in refusal(path)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1 and peak < 1_000_000


def test_headers_longer_than_the_file(tmp_path):
    path = write(tmp_path / "a.safetensors", {"a": entry()}, b"", length=100_000_000)
    tracemalloc.start()
    assert "its header alone needs 100000008 bytes, the file has" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_file_that_changed_while_it_was_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors", {"a": entry()})
    size = path.stat().st_size
    status = os.stat_result((*path.stat()[:6], size + 1, *path.stat()[7:10]))
    monkeypatch.setattr(headers.os, "fstat", lambda _: status)
    assert f"holds {size + 1} bytes, but its tensors end at {size}" in refusal(path)


def test_what_is_no_ordinary_file(tmp_path, monkeypatch):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "folder.safetensors", tmp_path / "pipe.safetensors", Path("/dev/zero")):
        assert "is not a regular file" in refusal(path)
    assert "is missing" in refusal(tmp_path / "gone.safetensors")
    (tmp_path / "lfs.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )
    with pytest.raises(IntegrityError, match=r"Git LFS pointer.*git lfs pull"):
        read_header(tmp_path / "lfs.safetensors")
    for name in ("a\x00b", "a" * 300):
        with pytest.raises(ModelError, match="cannot be read"):
            read_header(tmp_path / name)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(headers.os, "open", refuse)
    with pytest.raises(ModelError, match="cannot be read: Permission denied"):
        read_header(write(tmp_path / "a.safetensors", {"a": entry()}))


# -- model folders ---------------------------------------------------------------------------------------


def make_index(folder, weight_map, name="model.safetensors.index.json", **more):
    text = (
        weight_map
        if isinstance(weight_map, bytes)
        else json.dumps({**more, "weight_map": weight_map}).encode()
    )
    (folder / name).write_bytes(text)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    """A model of two shards: b has x and y, a has z."""
    model = tmp_path / "model"
    model.mkdir()
    write(model / "b.safetensors", {"y": entry(start=1, stop=2), "x": entry()}, b"xy")
    write(model / "a.safetensors", {"z": entry()}, b"z")
    make_index(model, {"x": "b.safetensors", "z": "a.safetensors", "y": "b.safetensors"})
    return model


def test_models_that_transformers_saves(tmp_path, tiny_llama):
    model = tiny_llama()
    state = dict(model.state_dict())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    (tmp_path / "hub").mkdir()
    save_torch_state_dict(state, tmp_path / "hub", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for place in ("one", "many", "hub"):
        found = open_shards(tmp_path / place)
        assert found.folder == tmp_path / place
        assert found.tensors.keys() == state.keys()
        assert {h.path.name for h in found.headers} == {
            p.name for p in (tmp_path / place).glob("*.safetensors")
        }
        assert all(stored(ref) == raw_bytes(state[name]) for name, ref in found.tensors.items())
        assert found.total_bytes == sum(tensor.nbytes for tensor in state.values())


def test_order_of_files_is_that_of_the_index(folder):
    found = open_shards(folder)
    assert [header.path.name for header in found.headers] == ["b.safetensors", "a.safetensors"]
    assert [(name, stored(ref)) for name, ref in found.tensors.items()] == [
        ("x", b"x"),
        ("y", b"y"),
        ("z", b"z"),
    ]
    assert found.total_bytes == 3


def test_what_else_an_index_may_hold(folder):
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for metadata in ({"total_size": 99}, {"total_size": 1.5, "ü": [{"x": None}]}, None, "ü", -1, []):
        make_index(folder, weight_map, metadata=metadata, more="\u1234")
        assert len(open_shards(folder).tensors) == 3


def test_files_that_are_not_the_model(folder):
    for name in (
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "._a.safetensors",
        "extra.safetensors",
    ):
        (folder / name).write_bytes(b"not read")
    make_index(folder, b"not read", name="consolidated.safetensors.index.json")
    assert len(open_shards(folder).headers) == 2


def test_one_index_or_one_file_of_any_name(folder):
    (folder / "model.safetensors.index.json").rename(folder / "my.safetensors.index.json")
    assert len(open_shards(folder).tensors) == 3
    make_index(folder, {"z": "a.safetensors"}, name="other.safetensors.index.json")
    with pytest.raises(ModelError, match=r"2 weight indexes: 'my.*', 'other.*Keep one"):
        open_shards(folder)
    make_index(folder, {"z": "a.safetensors"})
    assert list(open_shards(folder).tensors) == ["z"]
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(ModelError, match=r"'a.safetensors', 'b.safetensors' but no index.*Fetch the index"):
        open_shards(folder)
    (folder / "b.safetensors").unlink()
    assert list(open_shards(folder).tensors) == ["z"]
    (folder / "a.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert list(open_shards(folder).tensors) == ["z"]
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"'model-00001-of-00002.safetensors' but no index"):
        open_shards(folder)
    write(folder / "model.safetensors", {"z": entry()}, b"z")  # what interrupted saving leaves behind
    with pytest.raises(ModelError, match=r"'model-00001-of-00002.safetensors' but no index"):
        open_shards(folder)


def test_a_single_file_beside_shards(folder):
    same = {"x": entry(), "y": entry(start=1, stop=2), "z": entry(start=2, stop=3)}
    write(folder / "model.safetensors", same, b"XYZ")
    found = open_shards(folder)  # as transformers does
    assert [header.path.name for header in found.headers] == ["model.safetensors"]
    assert [stored(ref) for ref in found.tensors.values()] == [b"X", b"Y", b"Z"]
    for other in (
        {**same, "x": entry("I8")},
        {**same, "x": entry(shape=[1, 1])},
        {"q": entry(stop=3, shape=[3])},
    ):
        write(folder / "model.safetensors", other, b"XYZ")
        with pytest.raises(
            IntegrityError, match=r"two models: model.safetensors and the shards of .* differ in '[qx]'"
        ):
            open_shards(folder)
    write(folder / "model.safetensors", same, b"XYZ")
    make_index(folder, dict.fromkeys(same, "model.safetensors"))
    assert [header.path.name for header in open_shards(folder).headers] == ["model.safetensors"]
    make_index(folder, dict.fromkeys(same, "gone.safetensors"))
    with pytest.raises(IntegrityError, match=r"'gone.safetensors', which is missing"):
        open_shards(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.gguf", "model.h5"])
def test_folders_with_weights_of_another_kind(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=rf"holds its weights as {name}; only safetensors.*save_pretrained"):
        open_shards(tmp_path)


def test_folders_without_weights(tmp_path):
    with pytest.raises(ModelError, match=r"has no \*.safetensors weights. Is the download complete"):
        open_shards(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds only 'adapter_model.safetensors': adapters"):
        open_shards(tmp_path)
    for place in (tmp_path / "gone", tmp_path / "adapter_model.safetensors"):
        with pytest.raises(ModelError, match="is not a model folder"):
            open_shards(place)


MAP = '"weight_map":{"x":"b.safetensors","y":"b.safetensors","z":"a.safetensors"}'
NO_MAP = "it has no weight_map, or an empty one"
BAD_INDEXES = [
    (b"", "Expecting value"),
    *((text, NO_MAP) for text in (b"[]", b"{}")),
    *((b'{"weight_map":%s}' % text, NO_MAP) for text in (b"{}", b"[]", b"null")),
    ("{%s", "delimiter"),
    ("{%s}}", "Extra data"),
    ("{%s,%s}", "'weight_map' appears twice"),
    (b'{"weight_map":{"x":"b.safetensors","x":"b.safetensors"}}', "'x' appears twice"),
    (b'{"weight_map":{"\xff":"b.safetensors"}}', "'utf-8' codec can't decode"),
    ('{"metadata":nope,%s}', "Expecting value"),
    ('{"metadata":' + "[" * 100_000, "nested more than 64 levels deep"),
]


@pytest.mark.parametrize(("text", "part"), BAD_INDEXES, ids=range(len(BAD_INDEXES)))
def test_indexes_that_are_none(folder, text, part):
    raw = text.replace("%s", MAP).encode() if isinstance(text, str) else text
    index = make_index(folder, raw)
    start = time.process_time()
    with pytest.raises(IntegrityError) as caught:
        open_shards(folder)
    assert time.process_time() - start < 1
    assert (
        caught.value.message.startswith(f"{index} is not a weight index: ") and part in caught.value.message
    )
    assert "weight_map that maps tensor names to file names" in caught.value.hint


def test_an_index_that_is_too_large_is_not_read(folder):
    os.truncate(folder / "model.safetensors.index.json", 2**40)
    with pytest.raises(IntegrityError, match="more than 64000000 bytes"):
        open_shards(folder)


NO_PLAIN_NAMES = [
    *(
        "../secret.safetensors",
        "/etc/x.safetensors",
        "sub/a.safetensors",
        "./a.safetensors",
        "a.safetensors/",
    ),
    *("..\\a.safetensors", "C:a.safetensors", "C:\\a.safetensors", "a.safetensors\x00", "\x00.safetensors"),
    *("", ".", "..", ".safetensors", "a.bin", "a.safetensors\n", "//host/a.safetensors"),
]


@pytest.mark.parametrize("shard", NO_PLAIN_NAMES)
def test_shards_that_are_no_plain_names(folder, shard):
    write(folder.parent / "secret.safetensors", {"z": entry()})
    make_index(folder, {"x": "b.safetensors", "y": "b.safetensors", "z": shard})
    with pytest.raises(IntegrityError, match=r"only plain \*.safetensors names .* out of the model folder"):
        open_shards(folder)


def test_shards_that_are_missing_or_damaged(folder):
    for shard in ("gone.safetensors", "a" * 300 + ".safetensors"):
        make_index(folder, {"x": "b.safetensors", "y": "b.safetensors", "z": shard})
        with pytest.raises(
            IntegrityError, match=r"index.json names .*, which is missing. Is the download complete"
        ):
            open_shards(folder)
    make_index(folder, {"x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors"})
    (folder / "a.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"a.safetensors has 0 bytes"):
        open_shards(folder)


def test_index_and_headers_that_disagree(folder):
    good = {"x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors"}
    more = dict.fromkeys(("p", "q", "r", "s"), "a.safetensors")
    for weight_map, part in (
        (
            {**good, "w": "a.safetensors"},
            "about 'w': 'w' is in 'a.safetensors' by the index, in none of its files",
        ),
        (
            {"x": "b.safetensors", "z": "a.safetensors"},
            "'y' is in no file by the index, in 'b.safetensors' by",
        ),
        (
            {**good, "y": "a.safetensors"},
            "'y' is in 'a.safetensors' by the index, in 'b.safetensors' by their",
        ),
        ({**good, **more}, "about 'p', 'q', 'r' and 1 more"),
    ):
        make_index(folder, weight_map)
        with pytest.raises(IntegrityError) as caught:
            open_shards(folder)
        assert part in caught.value.message and "download or save all of them again" in caught.value.hint
    write(folder / "a.safetensors", {"z": entry(), "y": entry(start=1, stop=2)}, b"zy")
    make_index(folder, good)
    with pytest.raises(
        IntegrityError, match=r"The tensor 'y' is both in .*b.safetensors and in .*a.safetensors"
    ):
        open_shards(folder)


# -- links -----------------------------------------------------------------------------------------------


def make_cache(cache, shared=False):
    """A snapshot as huggingface_hub lays it out: links to blobs, which may be links to the shared store."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    blob = write(repository / "blobs" / "f00d", {"x": entry()}, b"x")
    if shared:
        store = cache / "blobs" / "ab"
        store.mkdir(parents=True)
        blob.rename(store / ("ab" * 32))
        blob.symlink_to(Path("../../blobs/ab") / ("ab" * 32))
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_snapshots_in_the_hugging_face_cache(tmp_path, shared):
    snapshot = make_cache(tmp_path / "hub", shared)
    assert stored(open_shards(snapshot).tensors["x"]) == b"x"
    assert open_shards(snapshot).tensors["x"].file == snapshot / "model.safetensors"
    (tmp_path / "short cut").symlink_to(snapshot)
    assert list(open_shards(tmp_path / "short cut").tensors) == ["x"]
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "model.safetensors").symlink_to("../../../blobs/f00d")
    assert list(open_shards(snapshot / "sub").tensors) == ["x"]


@pytest.mark.parametrize(
    "target",
    [
        "models--org--other/blobs/f00d",
        "models--org--name/refs/f00d",
        "models--org--name/blobs/deep/f00d",
        "models--org--name/snapshots/other/f00d",
        "blobs/ab/f00d",
        "blobs/cd/" + "ab" * 32,
        "other/ab/" + "ab" * 32,
        "f00d",
    ],
)
def test_links_from_a_snapshot_to_elsewhere(tmp_path, target):
    snapshot = make_cache(tmp_path / "hub")
    (tmp_path / "hub" / target).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / "hub" / target, {"x": entry()})
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "hub" / target)
    with pytest.raises(IntegrityError, match="outside the model folder"):
        open_shards(snapshot)


def test_blobs_are_open_to_snapshots_only(tmp_path):
    snapshot = make_cache(tmp_path / "hub")
    for place in ("model", "models--org--name/other/0123abcd", "datasets--org--name/snapshots/0123abcd"):
        folder = tmp_path / "hub" / place
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(snapshot / "model.safetensors")
        with pytest.raises(IntegrityError, match="outside the model folder"):
            open_shards(folder)


def test_links_within_and_out_of_a_folder(folder):
    outside = write(folder.parent / "secret.safetensors", {"z": entry()})
    inside = folder / "a.safetensors"
    inside.rename(folder / "real")
    inside.symlink_to("real")
    assert len(open_shards(folder).tensors) == 3
    assert check_inside(folder, inside) == (folder / "real").resolve()
    for target, part in (
        (outside, "leads to .*secret.safetensors, which is outside"),
        (folder / "no", "is missing"),
    ):
        inside.unlink()
        inside.symlink_to(target)
        with pytest.raises(IntegrityError, match=part):
            open_shards(folder)
        with pytest.raises(IntegrityError, match=part):
            read_header(inside, folder)
    inside.unlink()
    inside.symlink_to("a.safetensors")
    with pytest.raises(IntegrityError, match="cannot be followed"):
        check_inside(folder, inside)
    with pytest.raises(IntegrityError, match="outside the model folder"):
        check_inside(folder, folder / ".." / "secret.safetensors")
    with pytest.raises(IntegrityError, match="cannot be followed"):
        check_inside(folder, folder / "a\x00b")


def test_an_index_that_is_a_link_out_of_the_folder(folder):
    index = folder / "model.safetensors.index.json"
    shutil.move(index, folder.parent / "index.json")
    index.symlink_to("../index.json")
    with pytest.raises(IntegrityError, match="outside the model folder"):
        open_shards(folder)
