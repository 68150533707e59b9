"""Inputs and outputs of ONNX files, read without `onnx`, held against what `onnx` reads; and files that are none."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gap_export.bundle import onnx_header
from gap_export.bundle.folder import Bundle
from gap_export.bundle.onnx_header import ELEMENTS, Extent, Interface, Tensor, read_interface
from gap_export.errors import BundleError

TYPES = [number for number in onnx.TensorProto.DataType.values() if number]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def by_onnx(path: Path) -> Interface:
    """The independent reading."""
    graph = onnx.load(str(path), load_external_data=False).graph

    def extent(dim: Any) -> Extent:
        if dim.HasField("dim_value"):
            return int(dim.dim_value)
        return dim.dim_param or None

    def tensor(value: Any) -> Tensor:
        if not value.type.HasField("tensor_type"):
            return Tensor(value.name, "none", None)
        kind = value.type.tensor_type
        shape = tuple(map(extent, kind.shape.dim)) if kind.HasField("shape") else None
        return Tensor(value.name, ELEMENTS.get(kind.elem_type, f"type {kind.elem_type}"), shape)

    elsewhere = [entry for weight in graph.initializer for entry in weight.external_data]
    files = {entry.value for entry in elsewhere if entry.key == "location"}
    return Interface(tuple(map(tensor, graph.input)), tuple(map(tensor, graph.output)), frozenset(files))


@st.composite
def values(draw: st.DrawFn) -> Any:
    """Input or output of any type."""
    name, kind = (
        draw(NAMES),
        draw(st.sampled_from(["tensor", "tensor", "tensor", "sequence", "optional", "nothing"])),
    )
    made = onnx.helper.make_tensor_type_proto(
        draw(st.sampled_from(TYPES)),
        draw(st.none() | st.lists(st.none() | NAMES | st.integers(-(2**63), 2**63 - 1), max_size=5)),
    )
    if kind == "nothing":
        return onnx.ValueInfoProto(name=name)
    if kind == "sequence":
        made = onnx.helper.make_sequence_type_proto(made)
    if kind == "optional":
        made = onnx.helper.make_optional_type_proto(made)
    value = onnx.helper.make_value_info(name, made, doc_string=draw(NAMES))
    if draw(st.booleans()):
        value.metadata_props.add(key=draw(NAMES), value=draw(NAMES))
    return value


@st.composite
def models(draw: st.DrawFn) -> bytes:
    """Models with everything that has to be skipped: nodes, weights, attributes, functions, fields that no version has yet."""
    graph = onnx.GraphProto(name=draw(NAMES), doc_string=draw(NAMES))
    graph.input.extend(draw(st.lists(values(), max_size=4)))
    graph.output.extend(draw(st.lists(values(), max_size=4)))
    graph.value_info.extend(draw(st.lists(values(), max_size=2)))
    for _ in range(draw(st.integers(0, 3))):
        graph.node.append(onnx.helper.make_node("Scale", ["a"], ["b"], factor=draw(st.floats(width=32))))
        weight = onnx.TensorProto(
            name="w", raw_data=draw(st.binary(max_size=40)), dims=[draw(st.integers(0, 9))]
        )
        for _ in range(draw(st.integers(0, 2))):
            weight.external_data.add(key=draw(st.sampled_from(["location", "offset"])), value=draw(NAMES))
        graph.initializer.append(weight)
    model = onnx.ModelProto(
        ir_version=draw(st.integers(-(2**40), 2**40)), producer_name=draw(NAMES), graph=graph
    )
    model.opset_import.add(domain="", version=24)
    unknown = draw(st.sampled_from([b"", b"\xa5\x06abcd", b"\xa1\x06abcdefgh", b"\xa0\x06\xff\x01"]))
    return bytes(model.SerializeToString()) + unknown


@given(content=models())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_is_what_onnx_reads(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "made.onnx"
    path.write_bytes(content)
    assert read_interface(path) == by_onnx(path)


def test_graphs_of_bundles(tiny_bundle: Callable[..., Bundle], deep_bundle: Callable[..., Bundle]) -> None:
    read = 0
    for bundle in (tiny_bundle(), tiny_bundle(precision="fp16"), deep_bundle(pruner="fastv")):
        for name in bundle.manifest.graphs:
            found = read_interface(bundle.graph_path(name))
            assert found == by_onnx(bundle.graph_path(name))
            assert {tensor.name for tensor in found.inputs} == {
                tensor.name for tensor in bundle.manifest.graphs[name].spec.inputs
            }
            assert found.weight_files <= bundle.manifest.files.keys()
            read += 1
    assert read == 13


def refused(path: Path, content: bytes) -> BundleError | None:
    """Why a file is refused; None where it is read."""
    path.write_bytes(content)
    try:
        read_interface(path)
    except BundleError as error:
        return error
    return None


def refusals(path: Path, contents: list[bytes]) -> int:
    """How many of these are refused, each in one line that names the file."""
    errors = [error for content in contents if (error := refused(path, content)) is not None]
    assert all("\n" not in str(error) and error.subject == str(path) for error in errors)
    return len(errors)


def test_files_that_are_cut_short_or_changed(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    whole = tiny_bundle().graph_path("splice").read_bytes()
    cut = [whole[:end] for end in range(0, len(whole), 41)]
    assert refusals(tmp_path / "cut.onnx", cut) == len(cut)
    shuffle = random.Random(0)
    changed = []
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(shuffle.choice([1, 4, 40])):
            content[shuffle.randrange(len(content))] = shuffle.randrange(256)
        changed.append(bytes(content))
    count = refusals(tmp_path / "changed.onnx", changed)
    print(f"{len(cut)} cut short: all refused; {len(changed)} changed: {count} refused, the others read")
    assert 0 < count < len(changed)


def head(number: int, length: int) -> bytes:
    """What stands before the content of a field."""
    prefix = bytearray([number << 3 | 2])
    while length > 127:
        prefix.append(length & 127 | 128)
        length >>= 7
    return bytes([*prefix, length])


def field(number: int, content: bytes) -> bytes:
    return head(number, len(content)) + content


VALUE = field(1, b"x") + field(2, field(1, b"\x08\x01" + field(2, field(1, b"\x08\x02"))))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has 0 graphs"),
        (field(7, b"") * 2, "it has 2 graphs"),
        (b"\x38\x01", "field 7 is of another kind"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "it ends within a field"),
        (b"\xff" * 20, "a number does not end"),
        (b"\x3b\x3c", "a field is of kind 3"),
        (b"\x02\x00", "it ends within a field"),
        (field(7, b"\x58\x01"), "field 11 is of another kind"),
        (field(7, field(11, field(1, b"\xff"))), "a name is not UTF-8"),
        (field(7, field(11, b"\x08\x01")), "a number stands in the place of a message"),
        (field(7, field(11, field(1, b"x") * 2)), "field 1 stands twice"),
        (field(7, field(11, b"\x0a\x7fx")), "a field ends beyond what it stands in"),
        (field(7, field(11, VALUE[:-4] + field(1, field(1, b"xx")))), "ends beyond|another kind"),
        (field(7, field(12, b"\x22" + b"\x80\x80\x80\x01" + bytes(2**21))), "what describes a tensor takes"),
        (field(7, field(11, VALUE) * 17_000), "it has more than 16384 inputs and outputs"),
    ],
)
def test_files_that_are_no_onnx(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=f"is no ONNX file: .*({words})"):
        read_interface(tmp_path / "bad.onnx")


def test_functions_are_refused(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """A runtime writes them out: each may call another twice."""
    model = onnx.load(tiny_bundle().graph_path("splice"), load_external_data=False)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    opset = [onnx.helper.make_opsetid("", 24)]
    model.functions.append(onnx.helper.make_function("f", "f", ["x"], ["y"], [node], opset))
    path = tmp_path / "made.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="defines functions"):
        read_interface(path)
    del model.functions[:]
    path.write_bytes(model.SerializeToString())
    read_interface(path)


def test_nodes_and_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of half a gigabyte that is all hole takes no longer than its few fields."""
    path, nbytes = tmp_path / "large.onnx", 2**29
    raw = head(9, nbytes)
    weight = head(5, len(raw) + nbytes) + raw
    inner = field(11, VALUE) + weight
    start = head(7, len(inner) + nbytes) + inner
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + nbytes)
    assert read_interface(path) == Interface((Tensor("x", "float32", (2,)),), ())
    with path.open("r+b") as file:
        file.truncate(len(start) + nbytes - 1)
    with pytest.raises(BundleError, match="ends within a field"):
        read_interface(path)
    path.write_bytes(field(7, field(1, b"") * (onnx_header.MOST_FIELDS + 1)))
    with pytest.raises(BundleError, match="it has more than 524288 fields"):
        read_interface(path)
