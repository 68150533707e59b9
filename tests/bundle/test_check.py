"""Manifests that contradict themselves or their graphs, made from real ones by changing one thing: refused in one line, or harmless."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from gap_export.bundle import check, folder
from gap_export.bundle.check import check_manifest
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.hashes import record_of
from gap_export.bundle.interface import interface_fault
from gap_export.bundle.manifest import SCHEMA_VERSION, Manifest
from gap_export.bundle.onnx_header import Interface, Tensor, read_interface
from gap_export.errors import BundleError, GapExportError, InputError, SessionError
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.model import load
from gap_export.runtime.ort import OnnxRuntimeSession
from tests.bundle.mutations import Mutation, mutations

SAMPLE = 600
HARMLESS = {
    r"gap_export|versions(\..+)?": "says who built it",
    r"family": "looked up where a checkpoint is opened",
    r"graphs\.\w+(\.(operators|flops|weight_bytes)(\..+)?)?": "shown, and estimates of latency",
    r"graphs\.\w+\.spec(\.(in|out)puts\.\d+)?": "left out, it is the same as what stood there",
    r"gates(\..+)?|recipe\.gates": "what validate requires: any thresholds that it takes",
    r"recipe(\.(summary|family|base|vision_tower|text_tower|ranges|calibration|fit|max_pixels|prune_layers|targets|prompt"
    r"|compute_capabilities|keep_bound)(\..+)?)?": "what it was built from, where nothing was taken over",
    r"spec(\.(missing_features|published_tower)(\..+)?)?": "for pruners of other builds",
    r"spec\.(attention_heads|max_positions|position_rows)": "a larger model that the graphs could be of; or the same number",
    r"spec\.scaled_beyond": "from where on conversations are read anew with every question; their answers are the same",
    r"chat\.source": "said in messages",
    r"chat(\.(variables|begins_twice|separator)(\..+)?)?": "what the template writes of itself: any text, as the template; or left out",
    r"layout(\.(mean|std|background)(\.\d)?)?": "colours: any that there are",
    r"prompt(\.(add_special_tokens|eos_token_ids|image_token_id)(\.\d)?)?": "of the tokenizer, held against it",
    r"text_tower(\.(width|vocabulary|aligned_inversely))?": "inside the vision graph; expressions are held against it; or left out and the same",
    r"pruning(\.(merged|pruner_min_tokens|stages\.\d+(\.merged)?))?": "of the pruner; or left out and the same",
    r"files(\..+)?": "held against the files",
}
"""Fields that may be something else, and why."""


def read(mutation: Mutation) -> BundleError | None:
    """Why a manifest is refused; None where it is not."""
    content = json.dumps(mutation.content).encode()
    try:
        manifest = Manifest.parse(content, subject="manifest.json", hint="x", error=BundleError, strict=True)
        check_manifest(manifest, subject="manifest.json")
    except BundleError as error:
        return error
    return None


def sweep(bundle: Bundle, sample: int | None) -> Counter[str]:
    """Every mutation, or so many of them: how each ended."""
    content = json.loads((bundle.folder / "manifest.json").read_text())
    every = [each for each in mutations(content) if each.path[0] != "schema_version"]
    chosen = every if sample is None else random.Random(0).sample(every, sample)
    ends: Counter[str] = Counter()
    taken = []
    for mutation in chosen:
        error = read(mutation)
        if error is None:
            reason = next(
                (why for field, why in HARMLESS.items() if re.fullmatch(field, mutation.field)), None
            )
            if reason is None:
                taken.append(f"{mutation.field} {mutation.kind}")
            ends[f"taken: {reason}"] += 1
            continue
        text = str(error)
        assert text.isprintable(), (mutation.field, mutation.kind)
        assert len(text) < 600, (mutation.field, mutation.kind)
        ends["refused"] += 1
    print(f"{len(chosen)} of {len(every)} manifests:", *(f"\n  {ends[end]} {end}" for end in ends))
    assert not taken, "\n".join(["these are taken, and nothing says why:", *taken])
    assert ends["refused"] > 0.8 * len(chosen)
    return ends


def test_one_thing_wrong(tiny_bundle: Callable[..., Bundle], deep_bundle: Callable[..., Bundle]) -> None:
    for bundle in (tiny_bundle(), deep_bundle(pruner="fastv")):
        sweep(bundle, SAMPLE)


@pytest.mark.long
def test_every_one_thing_wrong(
    tiny_bundle: Callable[..., Bundle], deep_bundle: Callable[..., Bundle]
) -> None:
    bundles = [
        tiny_bundle(),
        tiny_bundle(keep="0.1:0.5:1.0"),
        tiny_bundle(pruner="prumerge", keep="adaptive"),
        tiny_bundle(pruner="trim"),
        deep_bundle(pruner="fastv"),
    ]
    ends = sum((sweep(bundle, None) for bundle in bundles), Counter[str]())
    print(f"{ends.total()} in all, {ends['refused']} refused")
    assert ends.total() > 100_000


EXAMPLES: tuple[tuple[str, Any, str], ...] = (
    ("pruning.kept", 0, "pruning keeps"),
    ("pruning.kept", 10**12, "pruning keeps"),
    ("pruning.min_tokens", 1, "pruning keeps"),
    ("pruning.keep", 0.5, "pruning keeps"),
    ("pruning.keep_mode", "dynamic", "pruning.keep_range"),
    ("capacity", 10**12, "capacity is 1000000000000, and is from 1 to 16777216"),
    ("capacity", 8, "the longest prompt and answer need"),
    ("spec.kv_heads", 3, "do not divide"),
    ("spec.grid", [5, 7], "36 visual tokens"),
    ("spec.max_positions", 8, "spec.max_positions is 8"),
    ("spec.token_range", {"min_tokens": 1, "typical_tokens": 1, "max_tokens": 1}, "spec.token_range is given"),
    ("layout.size", 10**9, "layout.size is 1000000000, and is from 1 to 10000"),
    ("layout.size", 48, "pixel_values float32"),
    ("layout.std.1", 1e-30, "layout.std.1 is 1e-30"),
    ("prompt.eos_token_ids.0", -1, "prompt.eos_token_ids.0 is -1"),
    ("prompt.eos_token_ids.0", 64, "of a vocabulary of 64"),
    ("prompt.grounding", "no slot", "0 times {expression}"),
    ("box.codec", "none", "box.codec is 'none', and the codecs are llava"),
    ("box", {"codec": "list_pixels", "frame": "image"}, "box.codec list_pixels is in pixels of padded_square"),
    ("recipe.box_format", "shikra", "box.codec is 'llava', and the recipe says 'shikra'"),
    ("chat", None, "chat is none, and chat_template.jinja is among the files"),
    ("chat.image_text", "words", "chat.image_text is 'words', and has the placeholder '<image>' in it once"),
    ("chat.image_token", "<img>", "has the placeholder '<img>' in it once"),
    ("chat.source", "x" * 2000, "the longest text of chat is 2000, and is from 0 to 1000"),
    ("chat.source", "a\x1b[31m", "chat.source is 'a\\x1b[31m', and is words"),
    ("chat.separator", "Answer no.", "chat.separator is 'Answer no.', and is white space"),
    ("chat.variables.bos_token", "x" * 2000, "the longest text of chat is 2000"),
    ("spec.scaled_beyond", 0, "spec.scaled_beyond is 0, and is from 1 to"),
    ("spec.scaled_beyond", 10**9, "spec.scaled_beyond is 1000000000, and is from 1 to"),
    ("max_new_tokens", 6, "and the recipe says 5"),
    ("graphs.vision.file", "../vision.onnx", "is not among the files that are hashed"),
    ("graphs.vision.spec.inputs.0.name", "pixels", "what follows from the rest is 'pixel_values'"),
    ("graphs.decoder.spec.aliased", {}, "is not every present with its past"),
)  # fmt: skip


def replaced(bundle: Bundle, field: str, value: Any, **also: Any) -> Mutation:
    """The manifest with another value in a field, and in further ones whose names have `__` for the dots."""
    content = json.loads((bundle.folder / "manifest.json").read_text())
    for name, new in {field: value, **{key.replace("__", "."): each for key, each in also.items()}}.items():
        place, path = content, [int(key) if key.isdigit() else key for key in name.split(".")]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = new
    return Mutation(tuple(path), "replaced", content)


@pytest.mark.parametrize(("field", "value", "words"), EXAMPLES)
def test_what_is_wrong_is_named(
    field: str, value: Any, words: str, tiny_bundle: Callable[..., Bundle]
) -> None:
    error = read(replaced(tiny_bundle(), field, value))
    assert error is not None
    assert words in error.message


BY_EMBEDDINGS = {"text_tower__checkpoint": None, "recipe__text_tower": None}


@pytest.mark.parametrize(
    ("field", "value", "also", "words"),
    [
        ("text_tower.kind", "embeddings", {}, "text_tower.kind is embeddings, and text_tower.checkpoint is"),
        ("text_tower.checkpoint", None, {}, "text_tower.kind is clip, and text_tower.checkpoint is None"),
        ("text_tower.checkpoint", None, {"recipe__text_tower": None}, "text_tower.kind is clip"),
        ("text_tower.checkpoint", "another", {}, "text_tower.checkpoint is 'another', and the recipe says"),
        ("text_tower.context", 2, {}, "text_tower.context is 2, and is from 3 to"),
        ("text_tower.context", 2**17, {}, "text_tower.context is 131072, and is from 3 to"),
        ("text_tower.kind", "embeddings", BY_EMBEDDINGS, "and that of the decoder's embeddings is"),
        ("text_tower", None, {}, "graphs.vision.spec.inputs"),
        ("text_tower.kind", "siglip", {}, "text_tower.kind"),
        ("text_tower.kind", None, {}, "text_tower.kind"),
    ],
)  # fmt: skip
def test_what_reads_the_expression_is_of_one_kind(
    field: str, value: Any, also: dict[str, Any], words: str, tiny_bundle: Callable[..., Bundle]
) -> None:
    error = read(replaced(tiny_bundle(pruner="trim"), field, value, **also))
    assert error is not None
    assert words in error.message
    assert str(error).isprintable()


def test_without_the_check_they_are_taken(
    tiny_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "manifest_faults", lambda manifest: iter(()))
    taken = [field for field, value, _ in EXAMPLES if read(replaced(tiny_bundle(), field, value)) is None]
    assert len(taken) >= len(EXAMPLES) - 2


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../b", "a//b", "./a", "a\\b", "C:a", "a\x00b", "a\nb", "x" * 300, "", " a"]
)
def test_names_of_files_are_plain(name: str, tiny_bundle: Callable[..., Bundle]) -> None:
    mutation = replaced(tiny_bundle(), "capacity", tiny_bundle().manifest.capacity)
    mutation.content["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    error = read(mutation)
    assert error is not None
    assert "is no plain name of a file in the folder" in error.message


# Graphs


@pytest.fixture
def edited(bundle_copy: Path) -> Callable[..., Path]:
    """`edited("vision", edit)`: the bundle with one ONNX file changed, its hash in the manifest right."""

    def apply(name: str, edit: Callable[[Any], None]) -> Path:
        path = bundle_copy / f"{name}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        edit(model.graph)
        path.write_bytes(model.SerializeToString())
        rehash(bundle_copy)
        return bundle_copy

    return apply


def rehash(bundle: Path) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    for name in content["files"]:
        content["files"][name] = record_of(bundle / name).model_dump()
    (bundle / "manifest.json").write_text(json.dumps(content))


def swapped(bundle: Bundle, target: Path) -> Iterator[tuple[str, str]]:
    """Every graph in the place of every other, with the right hash."""
    originals = {
        graph.file: (bundle.folder / graph.file).read_bytes() for graph in bundle.manifest.graphs.values()
    }
    for one, other in permutations(originals, 2):
        (target / one).unlink()
        (target / one).write_bytes(originals[other])
        rehash(target)
        yield one, other
        (target / one).write_bytes(originals[one])


def test_swapped_graphs_are_refused(
    tiny_bundle: Callable[..., Bundle],
    deep_bundle: Callable[..., Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 0
    for number, bundle in enumerate((tiny_bundle(), deep_bundle(pruner="fastv"))):
        target = Path(shutil.copytree(bundle.folder, tmp_path / str(number)))
        for one, _ in swapped(bundle, target):
            with pytest.raises(BundleError, match="it is another graph than") as caught:
                open_bundle(target)
            assert caught.value.subject.endswith(one)
            count += 1
    print(f"{count} swapped graphs, all refused")
    monkeypatch.setattr(folder, "check_graphs", lambda *_: None)
    monkeypatch.setattr("gap_export.runtime.ort_graph.interface_fault", lambda *_: None)
    for _ in swapped(tiny_bundle(), tmp_path / "0"):
        OnnxRuntimeSession(open_bundle(tmp_path / "0"), threads=1).close()  # the control: nothing is noticed


def test_a_session_looks_by_itself(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(shutil.copytree(tiny_bundle().folder, tmp_path / "bundle"))
    monkeypatch.setattr(folder, "check_graphs", lambda *_: None)
    for _ in swapped(tiny_bundle(), target):
        with pytest.raises(SessionError, match="graph and manifest do not belong together"):
            OnnxRuntimeSession(open_bundle(target), threads=1)


def dim(tensor: Any, number: int) -> Any:
    return tensor.type.tensor_type.shape.dim[number]


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("vision", lambda g: setattr(g.output[0], "name", "embeds"), "has no output visual_embeds"),
        ("vision", lambda g: g.output.add(name="more"), "has another output more"),
        ("splice", lambda g: g.input.append(g.input[0]), "has more than one input input_ids"),
        ("embed", lambda g: setattr(g.input[0].type.tensor_type, "elem_type", 6), "has input input_ids as type 6"),
        ("decoder", lambda g: setattr(dim(g.output[0], 1), "dim_value", 63), "where the manifest has float32"),
        ("decoder", lambda g: setattr(dim(g.input[4], 1), "dim_value", 4), "has input past.0.key"),
        ("decoder", lambda g: setattr(dim(g.input[4], 2), "dim_param", "slots"), "has input past.0.value"),
        ("decoder", lambda g: setattr(dim(g.input[4], 0), "dim_value", 4), "has input past.0.key"),
        ("embed", lambda g: g.input[0].type.tensor_type.shape.dim.pop(), "has input input_ids as int64 [batch]"),
        ("embed", lambda g: g.input[0].type.tensor_type.ClearField("shape"), "has input input_ids as int64,"),
        ("embed", lambda g: g.input[0].type.ClearField("tensor_type"), "has input input_ids as none,"),
        ("embed", lambda g: elsewhere(g, "../model.safetensors"), "has weights in '../model.safetensors'"),
        ("embed", lambda g: elsewhere(g, "other.bin"), "has weights in 'other.bin'"),
    ],
)  # fmt: skip
def test_a_graph_is_what_its_spec_says(
    name: str, edit: Callable[[Any], None], words: str, edited: Callable[..., Path]
) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(edited(name, edit))
    assert words in caught.value.message
    assert caught.value.subject.endswith(f"{name}.onnx")


def elsewhere(graph: Any, location: str) -> None:
    (entry,) = (each for each in graph.initializer[0].external_data if each.key == "location")
    entry.value = location


def test_tensors_are_found_by_name_and_never_by_order(
    tiny_bundle: Callable[..., Bundle], edited: Callable[..., Path]
) -> None:
    def reverse(graph: Any) -> None:
        for side in (graph.input, graph.output):
            values = list(side)[::-1]
            del side[:]
            side.extend(values)

    target = tiny_bundle().folder
    for name in tiny_bundle().manifest.graphs:
        target = edited(name, reverse)
    assert read_interface(target / "splice.onnx").inputs[-1].name == "input_ids"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    with load(tiny_bundle(), threads=1) as one, load(target, threads=1) as other:
        assert one.ground(image, "the red mug").text == other.ground(image, "the red mug").text


def test_outputs_may_leave_extents_open_and_inputs_may_not(tiny_bundle: Callable[..., Bundle]) -> None:
    spec = tiny_bundle().manifest.graphs["embed"].spec
    ids = Tensor("input_ids", "int64", ("b", "t"))
    for shape in (None, (None, None, 32), ("b", "t + 1", "h"), (2, 3, 32)):
        assert interface_fault(spec, Interface((ids,), (Tensor("inputs_embeds", "float32", shape),))) is None
    right = Tensor("inputs_embeds", "float32", ("b", "t", 32))
    for extents in (None, (None, "t"), ("b", 3), ("b",)):
        assert interface_fault(spec, Interface((Tensor("input_ids", "int64", extents),), (right,)))


# What opening leaves to those who read tokens


@pytest.mark.parametrize("token", [0, 63, 64, 10**6])
def test_another_placeholder_is_held_against_the_tokenizer(token: int, bundle_copy: Path) -> None:
    content = json.loads((bundle_copy / "manifest.json").read_text())
    content["prompt"]["image_token_id"] = token
    (bundle_copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"gives \d image placeholders instead of one"):
        Grounder(open_bundle(bundle_copy)).prompts(["mug"])


def test_tokens_beyond_the_embedding_are_an_error_before_the_run(bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["mug"] = 64
    path.unlink()
    path.write_text(json.dumps(content))
    rehash(bundle_copy)
    image = Image.new("RGB", (40, 60))
    with load(bundle_copy, threads=1) as model:
        model.ground(image, "the red cat")
        with pytest.raises(
            InputError, match=r"has the token 64 \('mug'\), and the model has an embedding of 64"
        ):
            model.ground(image, "the red mug")


# Reading


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text.replace('"capacity":', '"capacity": 1, "capacity":', 1), "stands twice"),
        (lambda text: text.replace('"keep": 0.25', '"keep": NaN', 1), "cannot be read"),
        (lambda text: text.replace('"keep": 0.25', '"keep": 1e999', 1), "cannot be read"),
        (lambda text: text.replace('"seed": 0', '"seed": "0"', 1), "pruning.seed '0'"),
        (lambda text: text.replace('"seed": 0', '"seed": false', 1), "pruning.seed False"),
        (lambda text: text.replace('"seed": 0', f'"seed": {"9" * 5000}', 1), "cannot be read"),
        (lambda text: text.replace('"stages": []', '"stages": ' + "[" * 500 + "]" * 500, 1), "cannot be read"),
        (lambda text: text + "{}", "cannot be read"),
    ],
)  # fmt: skip
def test_json_that_readers_differ_about(edit: Callable[[str], str], words: str, bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    text = edit(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle_copy)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_manifest_that_is_no_file_or_too_large(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    with path.open("ab") as file:
        file.truncate(2**27)
    with pytest.raises(BundleError, match="a manifest has at most"):
        open_bundle(bundle_copy)
    path.unlink()
    path.mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(bundle_copy)


def test_manifests_of_another_schema_are_not_looked_into(bundle_copy: Path) -> None:
    content = json.loads((bundle_copy / "manifest.json").read_text())
    for version in (-1, 0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, 10**12):
        (bundle_copy / "manifest.json").write_text(json.dumps({**content, "schema_version": version}))
        with pytest.raises(GapExportError, match=f"has schema {version}"):
            open_bundle(bundle_copy)
