"""Files of weights that lie about what they hold: safetensors as strictly as its own package, archives of torch.save without being run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from gap_export.checkpoint import safetensors as format_of
from gap_export.checkpoint.safetensors import BITS_PER_ELEMENT, TensorHeader, lay_out, read_header
from gap_export.checkpoint.torch_archive import read_torch_archive
from gap_export.errors import CheckpointError

# Safetensors

_SHARED = HealthCheck.function_scoped_fixture
_EXTENTS = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**63, 2**64, 1.0, True, None, "2"]))
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "F6_E2M3", "I64", "f32", "F128", None, 3]),
        "shape": st.one_of(st.lists(_EXTENTS, max_size=3), st.none()),
        "data_offsets": st.one_of(st.lists(st.one_of(st.integers(0, 24), _EXTENTS), min_size=1, max_size=3)),
    },
    optional={"more": st.sampled_from([1, None, [], 1e300])},
)
_HEADERS = st.one_of(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), _ENTRIES, max_size=3),
    st.fixed_dictionaries({"__metadata__": st.sampled_from([{}, {"x": "1"}, {"x": 1}, [], None, "x"])}),
    st.sampled_from([[], None, 3, "text"]),
)


@st.composite
def _sound(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header as it should be, and how many bytes follow it."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=5)):
        dtype, shape = (
            draw(st.sampled_from(sorted(BITS_PER_ELEMENT))),
            draw(st.lists(st.integers(0, 4), max_size=3)),
        )
        bits = BITS_PER_ELEMENT[dtype]
        for extent in shape:
            bits *= extent
        if bits % 8 == 0:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
            end += bits // 8
    return header, end


def _raw(header: Any, data: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def _theirs(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def _ours(content: bytes, folder: Path) -> bool:
    file = folder / "x.safetensors"
    file.write_bytes(content)
    try:
        read_header(file)
    except CheckpointError as error:
        return _told(error, file)
    return True


def _told(error: CheckpointError, file: Path) -> bool:
    """False, for what is refused as it should be."""
    assert error.subject == str(file)
    assert "\n" not in str(error)
    return False


@given(header=_HEADERS, data=st.integers(0, 24))
@settings(max_examples=150, suppress_health_check=[_SHARED])
def test_what_the_formats_package_refuses_is_refused(header: Any, data: int, tmp_path: Path) -> None:
    content = _raw(header, data)
    assert _ours(content, tmp_path) <= _theirs(content)


@given(sound=_sound(), cut=st.integers(-3, 3), moved=st.integers(-2, 2))
@settings(max_examples=150, suppress_health_check=[_SHARED])
def test_sound_headers_are_read_and_moved_ones_are_not(
    sound: tuple[dict[str, Any], int], cut: int, moved: int, tmp_path: Path
) -> None:
    header, end = sound
    if header:
        last = header[max(header)]
        last["data_offsets"] = [last["data_offsets"][0] + moved, last["data_offsets"][1] + moved]
    content = _raw(header, max(0, end + cut))
    assert _ours(content, tmp_path) == _theirs(content)


_ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_HALF = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"a": _ONE, "b": _ONE}), "'b' overlaps"),
        (json.dumps({"a": _HALF, "b": {**_HALF, "data_offsets": [2, 6]}}), "'b' overlaps"),
        (json.dumps({"a": {**_HALF, "data_offsets": [4, 8]}}), "'a' leaves a hole"),
        (json.dumps({"a": _HALF}), "4 bytes at its end belong to no tensor"),
        (json.dumps({"a": {**_ONE, "shape": [2**62, 4]}}), "has the shape"),
        (json.dumps({"a": {**_ONE, "dtype": "F128"}}), "stores 'a' as 'F128', an element type that is not known"),
        (json.dumps({"__metadata__": {"x": 1}, "a": _ONE}), "__metadata__ is more than text"),
        ('{"a": ' + json.dumps(_HALF) + ', "a": ' + json.dumps(_ONE) + "}", "'a' stands twice, with different values"),
        ("[" * 10**5, "nested too deeply"),
        ('{"a": NaN}', "NaN is no number"),
        ("\ufeff" + json.dumps({"a": _ONE}), "no JSON object"),
        ('{"\\ud800": ' + json.dumps(_ONE) + "}", "not Unicode"),
        ("{\xff", "is not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_said_of_headers(text: str, said: str, tmp_path: Path) -> None:
    content = text.encode("latin-1" if "\xff" in text else "utf-8")
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content + bytes(8))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert said in caught.value.message


def test_a_long_header_is_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", 10**8))
        out.truncate(10**8 + 8)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="has a header of 100000000 bytes"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_our_own_files_are_of_the_format(tmp_path: Path) -> None:
    """Tensors are aligned, and what lies between them is a tensor too."""
    parts = [TensorHeader(name, "U8", (extent,), extent) for name, extent in (("a", 3), ("b", 64), ("c", 1))]
    head, starts, size = lay_out(parts)
    file = tmp_path / "x.safetensors"
    file.write_bytes(head + bytes(size - len(head)))
    with safe_open(file, "np") as opened:
        assert {"a", "b", "c"} < set(opened.keys())
    ours = read_header(file)
    assert all(ours[name].offset == start and start % 64 == 0 for name, start in starts.items())


def test_without_the_check_overlaps_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    content = _raw({"a": _ONE, "b": _ONE}, 8)
    assert not _ours(content, tmp_path)
    monkeypatch.setattr(format_of, "_check_covered", lambda *_: None)
    assert _ours(content, tmp_path)


# Archives of torch.save


def _archive(
    description: bytes, records: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED
) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", how) as archive:
        archive.writestr("archive/data.pkl", description)
        for name, content in {"byteorder": b"little", "data/0": bytes(64), **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return target.getvalue()


def _tensor(
    *, key: str = "0", offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,)
) -> bytes:
    """A pickle of {"w": tensor}, as torch writes it."""

    class Described:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Stored(), offset, shape, strides, False, {})

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, each: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", 16) if isinstance(each, Stored) else None

    target = io.BytesIO()
    Pickler(target, 2).dump({"w": Described()})
    return target.getvalue()


def _calling(module: str, name: str, arguments: bytes) -> bytes:
    """A pickle that calls something."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"\x85R."


def _nested(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def _doubled(levels: int) -> bytes:
    """A tuple of itself twice, so often, as a key: hashing it takes 2^levels steps."""
    return b"\x80\x02}(" + b"K\x00" + b"q\x00h\x00\x86" * levels + b"K\x01u."


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "compressed": lambda: _archive(_tensor(), how=zipfile.ZIP_DEFLATED),
    "a bomb": lambda: _archive(_tensor(), {"data/1": bytes(10**8)}, zipfile.ZIP_DEFLATED),
    "two descriptions": lambda: _archive(_tensor(), {"x/data.pkl": _tensor()}),
    "big-endian": lambda: _archive(_tensor(), {"byteorder": b"big"}),
    "a storage that is not there": lambda: _archive(_tensor(key="7")),
    "a storage elsewhere": lambda: _archive(_tensor(key="../0")),
    "beyond its storage": lambda: _archive(_tensor(shape=(17,))),
    "before its storage": lambda: _archive(_tensor(offset=-1)),
    "of terabytes": lambda: _archive(_tensor(shape=(2**62,))),
    "the same row again and again": lambda: _archive(_tensor(shape=(10**9, 4), strides=(0, 1))),
    "more extents than strides": lambda: _archive(_tensor(shape=(2, 2))),
    "a model inside itself": lambda: _archive(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."),
    "nested deeply": lambda: _archive(_nested(10**5)),
    "a key that takes for ever": lambda: _archive(_doubled(60)),
    "a call of the system": lambda: _archive(_calling("os", "system", b"X\x04\x00\x00\x00true")),
    "another unpickler": lambda: _archive(_calling("pickle", "loads", b"X\x01\x00\x00\x00x")),
    "gigabytes of nothing": lambda: _archive(_calling("builtins", "bytearray", b"\x8a\x05\x00\x00\x00\x00\x10")),
    "a buffer of terabytes": lambda: _archive(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."),
    "a memo of terabytes": lambda: _archive(b"\x80\x02}r\xff\xff\xff\xff."),
    "text that grows": lambda: _archive(b"\x80\x02" + b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x03\x00\x00\x00hextR" * 50 + b"."),
    "another model's table changed": lambda: _archive(b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeX\x03\x00\x00\x00F64sb."),
    "nothing": lambda: _archive(b""),
    "no pickle": lambda: _archive(b"text"),
    "a list": lambda: _archive(pickle.dumps([1], 2)),
    "numbers by name": lambda: _archive(pickle.dumps({"a": 1}, 2)),
    "a bare pickle": lambda: pickle.dumps({"a": 1}, 2),
    "no archive": lambda: b"PK\x03\x04" + bytes(1000),
    "a listing without end": lambda: b"PK\x03\x04" + bytes(200) + b"PK\x05\x06" + bytes(8) + b"\xff" * 12 + bytes(2),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    file.write_bytes(ARCHIVES[name]())
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        read_torch_archive(file)
    assert tracemalloc.get_traced_memory()[1] < 50 * 10**6
    tracemalloc.stop()
    assert caught.value.subject == str(file)
    assert "\n" not in str(caught.value)
    file.write_bytes(_archive(_tensor()))
    assert read_torch_archive(file)["w"].dtype == "F32"


@given(at=st.integers(0, 10**4), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=100, suppress_health_check=[_SHARED])
def test_damage_anywhere_is_refused_or_of_no_harm(at: int, byte: int, cut: bool, tmp_path: Path) -> None:
    content = bytearray(_archive(_tensor()))
    at %= len(content)
    if cut:
        del content[at:]
    else:
        content[at] = byte
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    try:
        found = read_torch_archive(file)
    except CheckpointError as error:
        _told(error, file)
        return
    assert all(0 <= each.offset <= each.offset + each.length <= len(content) for each in found.values())


def test_what_training_programs_store_beside_the_weights_is_let_be(tmp_path: Path) -> None:
    beside = {
        "epoch": 3,
        "sizes": torch.Size([1]),
        "set": {1},
        "bytes": b"x",
        "number": 1j,
        "type": torch.float16,
    }
    weights = {
        "w": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
        "one": torch.tensor(1.5),
        "none": torch.empty(0, 3),
    }
    torch.save({"model": weights, "optimizer": {0: {"step": torch.tensor(1)}}, **beside}, tmp_path / "x.pth")
    found = read_torch_archive(tmp_path / "x.pth")
    assert {key: each.shape for key, each in found.items()} == {"w": (2, 3), "one": (), "none": (0, 3)}


def test_a_call_is_a_real_one() -> None:
    """The control: an ordinary unpickler runs what is refused here."""
    with zipfile.ZipFile(io.BytesIO(ARCHIVES["a call of the system"]())) as archive:
        assert pickle.loads(archive.read("archive/data.pkl")) == 0
