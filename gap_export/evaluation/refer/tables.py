"""Parquet tables from outside: what one declares is held against its size before anything is unpacked, and rows come in pieces.

A dictionary lets a few bytes stand for a large text in millions of rows, so neither the file's size nor the size that it declares
bounds what comes out of it: the pieces are counted as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gap_export.errors import GapExportError, MissingRequirementError, first_line
from gap_export.evaluation.refer.json_rows import packed
from gap_export.files import FileKind, check_readable, opened, read_bytes

_MOST_PACKED = 100
"""Bytes that one byte of a file may stand for, of compressed texts and numbers."""
_ALLOWANCE = 2**26
_ROW_BYTES = 4
"""No row of an expression or of an answer takes less."""
_PIECE_BYTES, _PIECE_ROWS = 2**26, 1024
_MOST_BYTES = 2**32
"""Of the columns of one group of rows; more is not worked with at once."""


class Table:
    """An opened table.

    Args:
        path: of the file.
        kind: of the file. One with a limit of size is read as a whole, others stay on the disk.

    Attributes:
        content: of the file, where it was read.
        schema: names and types of the columns.
        groups: how many groups of rows there are.

    Raises:
        GapExportError: of the kind's type: it cannot be read, or declares more than its size explains.
        MissingRequirementError: pyarrow is not installed.
    """

    def __init__(self, path: Path, kind: FileKind) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise MissingRequirementError(
                "is not installed", subject="pyarrow", hint="pip install 'gap-export[eval]'"
            ) from error
        self.path, self._kind = path, kind
        self.content = b""
        if kind.largest is None:
            check_readable(path, kind)
            with opened(path, kind) as file:
                packed(file.read(32), path)
            size, source = path.stat().st_size, path
        else:
            self.content = read_bytes(path, kind)
            packed(self.content[:32], path)
            size, source = len(self.content), pyarrow.BufferReader(self.content)
        with self._said():
            self._file = parquet.ParquetFile(source)
            self.schema, self.groups = self._file.schema_arrow, self._file.num_row_groups
            self._check_declared(size)

    def rows(
        self, columns: Sequence[str], *, groups: Sequence[int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows of some columns, in order.

        Args:
            columns: their names, all of which are there.
            groups: of rows; all of them when left out.

        Raises:
            GapExportError: of the kind's type.
        """
        for group in range(self.groups) if groups is None else groups:
            unpacked = 0
            pieces = self._file.iter_batches(
                self._rows_of_a_piece(group, columns), row_groups=[group], columns=list(columns)
            )
            while True:
                with self._said():
                    piece = next(pieces, None)
                    if piece is None:
                        break
                    unpacked += piece.nbytes
                    if unpacked > _MOST_BYTES:
                        raise self._error("unpacks to more than 4 GB in one group of rows")
                    rows = piece.to_pylist()
                yield from rows

    def _check_declared(self, size: int) -> None:
        """Hold what the file's end says against the file's size.

        Raises:
            GapExportError: there is more than that can be.
        """
        declared = self._file.metadata
        groups = [declared.row_group(number) for number in range(self.groups)]
        rows, unpacked = declared.num_rows, sum(group.total_byte_size for group in groups)
        if not 0 <= rows <= size // _ROW_BYTES or sum(group.num_rows for group in groups) != rows:
            raise self._error(f"declares {rows} rows, in {size} bytes")
        if not 0 <= unpacked <= _MOST_PACKED * size + _ALLOWANCE:
            raise self._error(f"declares {unpacked} bytes of content, in {size} bytes")

    def _rows_of_a_piece(self, group: int, columns: Sequence[str]) -> int:
        """So many that a piece stays small even where every row holds the largest value that its column can."""
        with self._said():
            declared = self._file.metadata.row_group(group)
            chunks = [declared.column(number) for number in range(declared.num_columns)]
            largest = max(
                (
                    chunk.total_uncompressed_size
                    for chunk in chunks
                    if chunk.path_in_schema.split(".")[0] in columns
                ),
                default=0,
            )
        return max(1, min(_PIECE_ROWS, _PIECE_BYTES // max(1, largest)))

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Say of the file what the library says; of one that is damaged, it raises whatever its bytes make it do."""
        try:
            yield
        except GapExportError:
            raise
        except UnicodeDecodeError as error:
            raise self._error(f"holds text that is not UTF-8: {error.reason}") from error
        except Exception as error:
            raise self._error(f"cannot be read: {first_line(error)}") from error

    def _error(self, message: str) -> GapExportError:
        return self._kind.error(message, subject=str(self.path), hint=self._kind.hint)
