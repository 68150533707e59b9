"""Opening bundles: the manifest survives its round trip, and damage is refused with the field's name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from gap_export.bundle.folder import Bundle, open_bundle, write_manifest
from gap_export.bundle.manifest import SCHEMA_VERSION, Manifest
from gap_export.cli import app
from gap_export.errors import BundleError, InputError
from gap_export.recipe.recipe import Recipe, load_recipe


@pytest.fixture
def change(bundle_copy: Path) -> Callable[..., Path]:
    """`change(edit)`: the manifest as a dict, edited in place, written back."""

    def apply(edit: Callable[[dict[str, Any]], Any]) -> Path:
        path = bundle_copy / "manifest.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return bundle_copy

    return apply


def test_manifest_survives_its_round_trip(bundle_copy: Path) -> None:
    manifest = open_bundle(bundle_copy, every_hash=True).manifest
    write_manifest(bundle_copy, manifest)
    assert open_bundle(bundle_copy).manifest == manifest


def test_a_bundle_answered_in_another_format_is_the_same_files(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    before = (bundle_copy / "manifest.json").read_bytes()
    other = bundle.written_as("list_pixels")
    assert (bundle.manifest.box.codec, bundle.box_format) == ("llava", None)
    assert (other.manifest.box.codec, other.manifest.box.frame) == ("list_pixels", "padded_square")
    assert (other.folder, other.manifest_sha256) == (bundle.folder, bundle.manifest_sha256)
    assert open_bundle(other).manifest == other.manifest, (
        "a bundle that is opened again forgets how it is read"
    )
    assert bundle.written_as(None) is bundle
    assert (bundle_copy / "manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="did you mean 'list_pixels'"):
        bundle.written_as("list_pixel")


def test_a_recipe_without_a_box_format_is_stored_as_before_there_was_one(bundle_copy: Path) -> None:
    assert "box_format" not in json.loads((bundle_copy / "manifest.json").read_text())["recipe"]


def test_paths_of_a_bundle(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle()
    assert all(bundle.graph_path(name).is_file() for name in ("vision", "splice", "embed", "decoder"))
    assert bundle.tokenizer_path.is_file()
    assert bundle.reports.parent == bundle.folder


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.update(schema_version=99), "has schema 99"),
        (lambda m: m.pop("capacity"), "capacity"),
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m["pruning"].update(positions="packed"), "pruning.positions"),
        (lambda m: m["layout"].update(std=[0, 0, 0]), "layout.square.std"),
        (lambda m: m.update(precision="int2"), "precision"),
        (lambda m: m.update(files=None), "files"),
    ],
)
def test_manifests_that_cannot_be_used(
    edit: Callable[[dict[str, Any]], Any], words: str, change: Callable[..., Path]
) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(change(edit))
    assert words in caught.value.message


def old(recipe: Any) -> Callable[[dict[str, Any]], Any]:
    """A manifest of schema 1: other names, which nobody reads."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest.update(schema_version=1, model=manifest.pop("spec"), recipe=recipe)

    return edit


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "--model shapes"),
        ({"keep": [0.1, 0.25, 1.0]}, "--model shapes --keep 0.1:0.25:1.0"),
        (
            {"pruner": "divprune", "targets": ["onnx", "tensorrt"], "text_tower": "a folder/clip"},
            "--model shapes --pruner divprune --text-tower 'a folder/clip' --target onnx --target tensorrt",
        ),
        ({"prompt": "another", "field_of_old": 3}, "--model shapes"),
        (
            {"max_text": 200, "box_format": "list_pixels"},
            "--model shapes --max-text 200 --box-format list_pixels",
        ),
        ({"name": "mine"}, "--model mine.yaml --checkpoint bundled:llava-shapes"),
        ({"name": "mine", "keep_bound": 0.3}, "--checkpoint bundled:llava-shapes --keep-bound 0.3"),
    ],
)
def test_an_old_manifest_names_the_command_that_builds_the_bundle_again(
    changes: dict[str, Any], command: str, change: Callable[..., Path]
) -> None:
    folder = change(old({**load_recipe("shapes").model_dump(mode="json"), **changes}))
    with pytest.raises(BundleError, match=f"has schema 1, this version reads {SCHEMA_VERSION}") as caught:
        open_bundle(folder)
    assert caught.value.hint.startswith("build it again: gap-export build --model ")
    assert command in caught.value.hint
    assert caught.value.hint.endswith(f" -o {folder} --replace")
    arguments = shlex.split(caught.value.hint.partition("gap-export build ")[2])
    known = {option for each in typer.main.get_command(app).commands["build"].params for option in each.opts}  # type: ignore[attr-defined]
    assert {argument for argument in arguments if argument.startswith("-")} <= known


def test_an_old_manifest_of_a_checkpoint_folder_names_that(change: Callable[..., Path]) -> None:
    recipe = Recipe(name="tiny", checkpoint="/models/tiny", family="llava", precision="fp16")
    with pytest.raises(BundleError) as caught:
        open_bundle(change(old(recipe.model_dump(mode="json"))))
    assert "gap-export build --model /models/tiny --precision fp16 -o " in caught.value.hint


@pytest.mark.parametrize("recipe", [None, [], "x", {}, {"name": 3}, {"name": "x"}, {"name": "x", "keep": {}}])
def test_an_old_manifest_that_is_damaged_says_so_too(recipe: Any, change: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match="has schema 1") as caught:
        open_bundle(change(old(recipe)))
    assert "gap-export build --model " in caught.value.hint


@pytest.mark.parametrize("version", [None, "two", [], {}])
def test_a_manifest_without_a_schema_is_damaged(version: Any, change: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match="cannot be read: schema_version"):
        open_bundle(change(lambda manifest: manifest.update(schema_version=version)))


def test_records_of_measurements_are_no_part_of_a_bundle(bundle_copy: Path) -> None:
    (bundle_copy / "reports").mkdir(exist_ok=True)
    (bundle_copy / "reports" / "parity.json").write_text("{}")
    assert "reports" not in str(open_bundle(bundle_copy, every_hash=True).manifest.files)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"{" * 100_000])
def test_manifests_that_are_no_json(content: bytes, bundle_copy: Path) -> None:
    (bundle_copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        open_bundle(bundle_copy)


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="is not a bundle"):
            open_bundle(folder)


@pytest.mark.parametrize("name", ["vision.onnx", "tokenizer.json", "model.safetensors"])
def test_every_file_is_checked(name: str, bundle_copy: Path) -> None:
    content = (bundle_copy / name).read_bytes()
    (bundle_copy / name).unlink()  # a linked file is shared with the checkpoint: never write through the link
    with pytest.raises(BundleError, match="missing") as caught:
        open_bundle(bundle_copy)
    assert caught.value.subject.endswith(name)
    (bundle_copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match="hash"):
        open_bundle(bundle_copy, every_hash=True)


def test_manifests_are_immutable(tiny_bundle: Callable[..., Bundle]) -> None:
    manifest: Manifest = tiny_bundle().manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.capacity = 3  # type: ignore[misc]
