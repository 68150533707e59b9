"""Where an evaluation came from, for those who read its results later: nothing is decided by it, so it may differ when a run is resumed."""

from __future__ import annotations

from pathlib import Path

from gap_export.environment import cpu_name, versions
from gap_export.records import Record

FILE = "provenance.json"


class Provenance(Record):
    """Where things were, and what answered.

    Attributes:
        bundle: folder; None where answers came from a file.
        data: as of `dataset.open_dataset`, a path made absolute.
        split: the same.
        images: folder of images, where the data set does not bring them.
        processor: of the machine that scored.
        versions: of Python and of the packages that run bundles.
    """

    bundle: str | None
    data: str
    split: str | None
    images: str | None
    processor: str
    versions: dict[str, str]


def provenance_of(bundle: Path | None, data: str, split: str | None, images: Path | None) -> Provenance:
    """Of an evaluation on this machine."""
    return Provenance(
        bundle=None if bundle is None else str(bundle.absolute()),
        data=str(Path(data).absolute()) if Path(data).exists() else data,
        split=split,
        images=None if images is None else str(images.absolute()),
        processor=cpu_name(),
        versions=versions(),
    )


def write_provenance(provenance: Provenance, folder: Path) -> None:
    """Into the folder of an evaluation."""
    provenance.write(folder / FILE)


def read_provenance(folder: Path) -> Provenance:
    """From the folder of an evaluation.

    Raises:
        InputError: it is missing or damaged.
    """
    return Provenance.read(
        folder / FILE,
        hint="it is missing or damaged: run the same evaluation again: what is answered is kept, and this file is written anew",
    )
