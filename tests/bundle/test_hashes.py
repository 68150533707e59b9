"""Records of files notice every change."""

from __future__ import annotations

from pathlib import Path

import pytest

from gap_export.bundle import hashes
from gap_export.bundle.hashes import FileRecord, record_of, verify
from gap_export.errors import BundleError


def test_hash_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert record_of(path) == FileRecord(
        bytes=3, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_every_change_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    files = {"sub/file": record_of(path)}
    verify(tmp_path, files, every_hash=False)
    path.write_bytes(b"12346")
    with pytest.raises(BundleError, match="hash"):
        verify(tmp_path, files, every_hash=False)
    path.write_bytes(b"1234")
    with pytest.raises(BundleError, match="has 4 bytes where the manifest says 5"):
        verify(tmp_path, files, every_hash=False)
    path.unlink()
    with pytest.raises(BundleError, match="missing"):
        verify(tmp_path, files, every_hash=False)


def test_large_files_are_hashed_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "HASHED_ON_OPEN", 4)
    path = tmp_path / "large"
    path.write_bytes(b"12345")
    files = {"large": record_of(path)}
    path.write_bytes(b"54321")
    verify(tmp_path, files, every_hash=False)
    with pytest.raises(BundleError, match="hash"):
        verify(tmp_path, files, every_hash=True)
    path.write_bytes(b"5432")
    with pytest.raises(BundleError, match="bytes"):
        verify(tmp_path, files, every_hash=False)
