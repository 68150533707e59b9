"""A bundle as a folder: opened, verified, its manifest written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from gap_export.bundle.check import check_graphs, check_manifest
from gap_export.bundle.check.files import CHAT_TEMPLATE, GOLDEN, GOLDEN_IMAGE
from gap_export.bundle.golden import GoldenRequest, read_golden
from gap_export.bundle.hashes import verify
from gap_export.bundle.manifest import SCHEMA_VERSION, Manifest
from gap_export.errors import BundleError, GapExportError
from gap_export.files import FolderKind, Listed, is_file, kinds, read_bytes, read_text, sha256_of
from gap_export.recipe.recipe import Recipe, known_recipes, load_recipe
from gap_export.records import Record

MANIFEST, REPORTS = "manifest.json", "reports"


def _listed(_: Path, manifest: dict[str, Any]) -> Mapping[str, Listed]:
    """Of a manifest of any schema: the files that it lists; any content will do where it lists no hash."""
    files = manifest["files"]
    listed = {}
    for name, record in files.items() if isinstance(files, dict) else ():
        size, sha256 = (
            (record.get("bytes"), record.get("sha256")) if isinstance(record, dict) else (None, None)
        )
        listed[name] = Listed(
            frozenset({sha256} if isinstance(sha256, str) else ()), size if isinstance(size, int) else None
        )
    return listed


BUNDLE = FolderKind(
    "bundle",
    MANIFEST,
    frozenset({"schema_version", "recipe", "files"}),
    names=re.compile(re.escape(MANIFEST)),
    # A rebuild takes the first over; the others lie there unlisted where adding them was interrupted.
    unlisted=re.compile(f"{REPORTS}/.*|{re.escape(GOLDEN)}|{re.escape(GOLDEN_IMAGE)}", re.DOTALL),
    listed=_listed,
)
"""How folders of bundles are told."""

_IN_FILES_ALONE = {
    "name",
    "family",
    "summary",
    "prompt",
    "images",
    "fit",
    "max_batch",
    "compute_capabilities",
    "gates",
}
"""Fields of a recipe that no option of `build` replaces."""


class Bundle:
    """An opened bundle folder.

    Attributes:
        folder: where it lies.
        manifest: what is inside.
        box_format: by which its answers are read in place of the one that it was built with; None for that one.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.box_format: str | None = None

    def written_as(self, name: str | None) -> Bundle:
        """A view of the bundle whose answers are read in another box format; its files are not touched.

        Args:
            name: of the format, a key in `boxes.codecs.CODECS`; None changes nothing.

        Raises:
            InputError: there is none of that name, or it is in pixels, and the model's images become tiles or are cut.
        """
        if name is None:
            return self
        box = self.manifest.box.written_as(name, self.manifest.layout)
        view = Bundle(self.folder, self.manifest.model_copy(update={"box": box}))
        view.box_format = name
        return view

    def graph_path(self, name: str) -> Path:
        """Path of one ONNX graph."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer."""
        return self.folder / "tokenizer.json"

    @property
    def text_tokenizer_path(self) -> Path:
        """Path of the tokenizer of expressions that the pruner reads: the text tower's, where there is one, otherwise the decoder's."""
        tower = self.manifest.text_tower
        return self.folder / "text_tokenizer.json" if tower and tower.kind == "clip" else self.tokenizer_path

    @property
    def chat_template_path(self) -> Path:
        """Path of the chat template."""
        return self.folder / CHAT_TEMPLATE

    @property
    def chat_template(self) -> str:
        """The chat template, in Jinja.

        Raises:
            BundleError: it cannot be read.
        """
        try:
            return read_text(self.chat_template_path, kinds.CHAT_TEMPLATE)
        except GapExportError as error:
            raise BundleError(error.message, subject=error.subject, hint="build the bundle again") from error

    @cached_property
    def golden(self) -> GoldenRequest | None:
        """A request whose answer is known; None where the bundle was built without one.

        Raises:
            BundleError: it cannot be read, or is none of this bundle.
        """
        return read_golden(self.folder, self.manifest)

    @property
    def reports(self) -> Path:
        """Folder of the records of measurements, which are no part of the bundle: no manifest or hash covers them.

        A rebuild leaves them there. Each names the build that it was taken on, by `manifest_sha256`.
        """
        return self.folder / REPORTS

    @property
    def runs(self) -> Path:
        """Folder beside the bundle that its evaluations go to by default."""
        folder = self.folder if self.folder.name not in ("", "..") else self.folder.resolve()
        return folder.with_name(f"{folder.name}.runs")

    @cached_property
    def manifest_sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of all other files: it tells one build from another."""
        return sha256_of(self.folder / MANIFEST)


def open_bundle(bundle: Bundle | Path | str, *, every_hash: bool = False) -> Bundle:
    """Read and verify a bundle.

    Args:
        bundle: its folder; one that was opened before is read and verified again, and keeps the box format that it is read in.
        every_hash: verify the hashes of large files too.

    Raises:
        BundleError: no bundle there, another schema, a damaged manifest, a file that does not match.
    """
    folder = bundle.folder if isinstance(bundle, Bundle) else Path(bundle)
    path = folder / MANIFEST
    if not is_file(path):
        raise BundleError(
            "is not a bundle (no manifest.json)",
            subject=str(folder),
            hint="build one: gap-export build --help",
        )
    content = read_bytes(path, kinds.MANIFEST)
    damaged = kinds.MANIFEST.hint
    head = _Head.parse(content, subject=str(path), hint=damaged, error=BundleError)
    if head.schema_version != SCHEMA_VERSION:
        raise BundleError(
            f"has schema {head.schema_version}, this version reads {SCHEMA_VERSION}",
            subject=str(path),
            hint=f"build it again: {_build_command(head.recipe, folder)}",
        )
    manifest = Manifest.parse(content, subject=str(path), hint=damaged, error=BundleError, strict=True)
    check_manifest(manifest, subject=str(path))
    verify(folder, manifest.files, every_hash=every_hash)
    check_graphs(folder, manifest)
    return Bundle(folder, manifest).written_as(bundle.box_format if isinstance(bundle, Bundle) else None)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle."""
    manifest.write(folder / MANIFEST)


class _Head(Record):
    """What can be read of a manifest of any schema."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int
    recipe: Any = None


def _build_command(recipe: Any, folder: Path) -> str:
    """The command that builds a bundle again which this version cannot read.

    Args:
        recipe: as the old manifest has it, in whatever state.
        folder: of the bundle.
    """
    ending = f"-o {shlex.quote(str(folder))} --replace"
    if not isinstance(recipe, dict) or not isinstance(recipe.get("name"), str):
        return f"gap-export build --model RECIPE {ending}"
    name, checkpoint, known = recipe["name"], str(recipe.get("checkpoint")), known_recipes()
    default = load_recipe(name) if name in known else Recipe(name=name, checkpoint="")
    left_out = {**dict.fromkeys(Recipe.model_fields), **default.model_dump(mode="json")}
    changed = {
        field: value
        for field, value in recipe.items()
        if field in left_out and value not in (None, left_out[field])
    }
    if name in known:
        model = name
    elif changed.keys() & _IN_FILES_ALONE - {"family"}:
        model = f"{name}.yaml"
    else:  # a folder or a hub id stood in the place of a recipe
        model = checkpoint
        changed.pop("checkpoint", None)
    options = [
        f"{_option(field)} {shlex.quote(str(each))}"
        for field, value in changed.items()
        if field not in _IN_FILES_ALONE
        for each in _values(field, value)
    ]
    return " ".join(["gap-export build --model", shlex.quote(model), *options, ending])


def _option(field: str) -> str:
    """The option of `build` that replaces a field of a recipe."""
    return "--target" if field == "targets" else "--" + field.replace("_", "-")


def _values(field: str, value: Any) -> list[Any]:
    """What stands after an option: once, or as often as the option is repeated."""
    if not isinstance(value, list):
        return [value]
    return [":".join(map(str, value))] if field == "keep" else value
