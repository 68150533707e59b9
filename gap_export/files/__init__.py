"""Files and folders: written whole or not at all, linked where that is possible, hashed; nothing of somebody else's is ever touched."""

from gap_export.files.file import (
    check_output_file,
    place_file,
    readable_size,
    sha256_of,
    write_atomically,
    writing,
)
from gap_export.files.folder import atomic_folder, scratch_folder
from gap_export.files.lock import FolderLock
from gap_export.files.ownership import FolderKind, check_folder

__all__ = [
    "FolderKind",
    "FolderLock",
    "atomic_folder",
    "check_folder",
    "check_output_file",
    "place_file",
    "readable_size",
    "scratch_folder",
    "sha256_of",
    "write_atomically",
    "writing",
]
