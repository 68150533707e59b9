"""Evaluations of the tiny bundle, made once: PyTorch's and ONNX Runtime's, and of a bundle that lets requests choose."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gap_export.bundle.folder import Bundle

LIMIT = ["--data", "scenes:3", "--limit", "12", "--threads", "1"]


def gap_export(*arguments: object, code: int = 0) -> str:
    """Run a command; its standard output, or what it says when it refuses."""
    command = [sys.executable, "-m", "gap_export", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="session")
def evaluated(tiny_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a bundle, and with evaluations `torch` and `ort` of it."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(tiny_bundle().folder, folder / "bundle")
    gap_export("eval", folder / "bundle", *LIMIT, "-o", folder / "ort")
    gap_export("eval", folder / "bundle", *LIMIT, "-o", folder / "torch", "--backend", "torch")
    return folder


@pytest.fixture(scope="session")
def recommended(tiny_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was evaluated at three shares; the smallest is chosen, as a random model loses nothing."""
    folder = tmp_path_factory.mktemp("recommended") / "bundle"
    source = tiny_bundle(pruner="divprune", keep="0.1:0.3:1.0").folder
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("reports"))
    gap_export("recommend", folder, *LIMIT, "--keep", "1.0,0.5,0.3", "--requests", 2)
    return folder
