"""A bundle as a folder: opened, verified, its manifest written."""

from __future__ import annotations

from pathlib import Path

from gap_export.bundle.manifest import SCHEMA_VERSION, Manifest
from gap_export.errors import BundleError
from gap_export.files import verify

MANIFEST = "manifest.json"


class Bundle:
    """An opened bundle folder.

    Attributes:
        folder: where it lies.
        manifest: what is inside.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def graph_path(self, name: str) -> Path:
        """Path of one ONNX graph."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer."""
        return self.folder / "tokenizer.json"

    @property
    def text_tokenizer_path(self) -> Path:
        """Path of the text tower's tokenizer, where there is one."""
        return self.folder / "text_tokenizer.json"

    @property
    def reports(self) -> Path:
        """Folder of the records that measuring commands leave behind; not part of the hashed content."""
        return self.folder / "reports"


def open_bundle(folder: Path, *, every_hash: bool = False) -> Bundle:
    """Read and verify a bundle.

    Args:
        folder: the bundle.
        every_hash: verify the hashes of large files too.

    Raises:
        BundleError: no bundle there, another schema, a damaged manifest, a file that does not match.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            "is not a bundle (no manifest.json)",
            subject=str(folder),
            hint="build one: gap-export build --help",
        )
    manifest = Manifest.read(
        path,
        hint="the bundle is damaged or was made by another version: build it again",
        error=BundleError,
    )
    if manifest.schema_version != SCHEMA_VERSION:
        raise BundleError(
            f"has schema {manifest.schema_version}, this version reads {SCHEMA_VERSION}",
            subject=str(path),
            hint="build the bundle again with this version",
        )
    verify(folder, manifest.files, every_hash=every_hash)
    return Bundle(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle."""
    manifest.write(folder / MANIFEST)
