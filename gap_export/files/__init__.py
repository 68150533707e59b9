"""Files and folders: read within bounds, written whole or not at all, hashed; nothing of somebody else's is ever touched."""

from gap_export.files.file import (
    check_output_file,
    place_file,
    readable_size,
    sha256_of,
    write_atomically,
    writing,
)
from gap_export.files.folder import atomic_folder, scratch_folder
from gap_export.files.hidden import visible
from gap_export.files.kinds import FileKind
from gap_export.files.listing import FILES, ListedFolder, results_kind
from gap_export.files.lock import FolderLock
from gap_export.files.ownership import HASHED, FolderKind, Listed, check_folder
from gap_export.files.read import (
    check_readable,
    decoded,
    is_file,
    is_folder,
    opened,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)

__all__ = [
    "FILES",
    "HASHED",
    "FileKind",
    "FolderKind",
    "FolderLock",
    "Listed",
    "ListedFolder",
    "atomic_folder",
    "check_folder",
    "check_output_file",
    "check_readable",
    "decoded",
    "is_file",
    "is_folder",
    "opened",
    "parse_json",
    "place_file",
    "read_bytes",
    "read_json",
    "read_text",
    "read_yaml",
    "readable_size",
    "results_kind",
    "scratch_folder",
    "sha256_of",
    "visible",
    "write_atomically",
    "writing",
]
