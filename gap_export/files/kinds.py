"""The kinds of files that are read, a row each: how large one may be, and what to do about one that cannot be read.

Limits are far above what such files have, and low enough that one of that size does no harm: what is parsed takes some ten times its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gap_export.errors import BundleError, CheckpointError, GapExportError, InputError, RecipeError

_KB, _MB, _GB = 10**3, 10**6, 10**9


@dataclass(frozen=True)
class FileKind:
    """A kind of file from outside.

    Attributes:
        name: with its article, for messages.
        largest: bytes that are read of one; None where files are mapped or read in pieces.
        error: raised for one that cannot be read.
        hint: what to do then.
    """

    name: str
    largest: int | None
    error: type[GapExportError]
    hint: str


_FETCH = "fetch the checkpoint again"
_REBUILD = "the bundle is damaged: build it again"
_AGAIN = "get the file again"
_RERUN = "it is damaged: run the command again that wrote it"

RECIPE = FileKind("a recipe", 250 * _KB, RecipeError, "see recipes/ for examples")
CONFIG = FileKind("a config", 16 * _MB, CheckpointError, _FETCH)
WEIGHT_INDEX = FileKind("an index of weights", 64 * _MB, CheckpointError, _FETCH)
WEIGHTS = FileKind("a file of weights", None, CheckpointError, _FETCH)
CHAT_TEMPLATE = FileKind("a chat template", 4 * _MB, CheckpointError, _FETCH)
TOKENIZER = FileKind("a tokenizer", 256 * _MB, CheckpointError, _FETCH)
MANIFEST = FileKind("a manifest", 16 * _MB, BundleError, _REBUILD)
BUNDLE_TOKENIZER = FileKind("a bundle's tokenizer", 256 * _MB, BundleError, _REBUILD)
GOLDEN = FileKind(
    "a golden request",
    4 * _MB,
    BundleError,
    "it is damaged: make it again with gap-export golden BUNDLE --replace",
)
GOLDEN_IMAGE = FileKind(
    "the image of a golden request",
    64 * _MB,
    BundleError,
    "it is damaged: make it again with gap-export golden BUNDLE --replace",
)
GRAPH = FileKind("a graph", 2 * _GB, InputError, "export it again, with weights of more than 2 GB beside it")
BUNDLE_GRAPH = FileKind("a bundle's graph", 2 * _GB, BundleError, _REBUILD)
ENGINE = FileKind("an engine", None, BundleError, "build it again")
RANGES = FileKind("a file of ranges", 64 * _MB, RecipeError, "write it with gap-export calibrate")
REPORT = FileKind("a report", 256 * _MB, InputError, _RERUN)
JOURNAL = FileKind("a journal", _GB, InputError, "run eval with --replace, or with another -o")
RESULTS = FileKind("a table of results", _GB, InputError, "run eval again")
ANNOTATIONS = FileKind("annotations", 2 * _GB, InputError, _AGAIN)
ANNOTATION_TABLE = FileKind("a table of annotations", None, InputError, _AGAIN)
PREDICTIONS = FileKind("predictions", 2 * _GB, InputError, _AGAIN)
TEXT = FileKind("a text", 16 * _MB, InputError, "give a file of prose in UTF-8")
RECEIPT = FileKind(
    "a receipt", 16 * _MB, InputError, "give the `receipt` of an answer, as the server sent it"
)
MESSAGES = FileKind(
    "a conversation", 64 * _MB, InputError, "give the `messages` that were sent, or the whole body, as JSON"
)
KEYS = FileKind("a file of keys", _MB, InputError, "write one key a line")
IMAGE = FileKind("an image", 512 * _MB, InputError, "give an image file: JPEG, PNG, WebP, BMP, ...")

FILE_KINDS = (
    RECIPE,
    CONFIG,
    WEIGHT_INDEX,
    WEIGHTS,
    CHAT_TEMPLATE,
    TOKENIZER,
    MANIFEST,
    BUNDLE_TOKENIZER,
    GOLDEN,
    GOLDEN_IMAGE,
    GRAPH,
    BUNDLE_GRAPH,
    ENGINE,
    RANGES,
    REPORT,
    JOURNAL,
    RESULTS,
    ANNOTATIONS,
    ANNOTATION_TABLE,
    PREDICTIONS,
    TEXT,
    RECEIPT,
    MESSAGES,
    KEYS,
    IMAGE,
)
