"""A tokenizer from its file: whatever the file holds, and however the library fails over it, in one kind of error."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from gap_export.errors import CheckpointError, GapExportError, first_line
from gap_export.files import kinds, read_bytes

_LONGEST_REASON = 200


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`; truncation and padding stored in it are switched off.

    Raises:
        CheckpointError: missing or unreadable.
    """
    if not os.path.lexists(path):
        raise CheckpointError("does not exist", subject=str(path), hint="the folder needs a tokenizer.json")
    # (The library opens no path whose name is not UTF-8.)
    content = read_bytes(path, kinds.TOKENIZER)
    with tokenizer_errors(str(path)):
        tokenizer = Tokenizer.from_buffer(content)
    # Silent truncation would cut the end of the prompt, and padding would put real tokens where PAD belongs.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ids_in_front(tokenizer: Tokenizer) -> list[int]:
    """Ids that a tokenizer puts in front of every text, its start token where it has one.

    Raises:
        CheckpointError: it cannot encode.
    """
    with tokenizer_errors("tokenizer.json"):
        encoding = tokenizer.encode("a", add_special_tokens=True)
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [int(id_) for id_, _ in itertools.takewhile(lambda pair: pair[1], pairs)]


@contextmanager
def tokenizer_errors(subject: str, says: str = "is not a tokenizer") -> Iterator[None]:
    """Turn whatever `tokenizers` raises inside the block into one kind of error.

    Args:
        subject: what is read, for the message.
        says: what is wrong with it then.

    Raises:
        CheckpointError: the library has no types of errors: it raises plain exceptions, and for damage that it does not expect a panic,
            which is no `Exception`.
    """
    try:
        yield
    except GapExportError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{says}: {first_line(error)[:_LONGEST_REASON]}",
            subject=subject,
            hint="save it again with save_pretrained",
        ) from error
