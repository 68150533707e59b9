"""Opening bundles: the manifest survives its round trip, and damage is refused with the field's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle, open_bundle, write_manifest
from gap_export.bundle.manifest import Manifest
from gap_export.errors import BundleError


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
        (lambda m: m["preprocessing"].update(std=[0, 0, 0]), "preprocessing.square.std"),
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
