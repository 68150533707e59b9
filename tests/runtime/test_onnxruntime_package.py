"""ONNX Runtime comes in several distributions that install one folder: none of them, and two of them, are errors that say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from gap_export.errors import MissingRequirementError
from gap_export.runtime.onnxruntime_package import DISTRIBUTIONS, check_distributions

ROOT = Path(__file__).resolve().parent.parent.parent


def stand_in(folder: Path, name: str, version: str = "1.31.0") -> None:
    """What pip leaves of a distribution for others to find."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "onnxruntime"])
def test_two_that_overwrite_each_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_distributions()
    stand_in(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingRequirementError) as refused:
        check_distributions()
    own = metadata.version("onnxruntime")
    assert refused.value.subject == f"onnxruntime {own} and {name} 1.31.0"
    assert refused.value.hint.startswith(
        f"pip uninstall onnxruntime {name}; then pip install 'gap-export[cpu]'"
    )


def test_plug_ins_are_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime-ep-openvino", "onnxruntime-genai", "onnxruntime-extensions"):
        stand_in(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    check_distributions()


def command(*arguments: object, before: str = "pass", **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; {before}; from gap_export.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_commands_say_it(bundle_copy: Path, image_file: Path, tmp_path: Path) -> None:
    asked = ("run", bundle_copy, "--image", image_file, "--refer", "the red mug")
    stand_in(tmp_path / "both", "onnxruntime-gpu")
    both = command(*asked, PYTHONPATH=os.pathsep.join([str(tmp_path / "both"), str(ROOT)]))
    assert both.returncode == 2
    assert "and onnxruntime-gpu 1.31.0: are installed in one folder" in both.stderr
    absent = 'sys.modules["onnxruntime"] = None'
    for more in ((), ("--backend", "openvino")):
        neither = command(*asked, *more, before=absent)
        assert neither.returncode == 2
        assert "onnxruntime: is needed to run graphs, and not installed" in neither.stderr
        assert "pip install 'gap-export[cpu]', or 'gap-export[gpu]' where" in neither.stderr
        assert "Traceback" not in neither.stderr
    assert command("inspect", bundle_copy, before=absent).returncode == 0


def test_no_extra_brings_a_second_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    brought = {
        extra: [each for each in needed if each.startswith("onnxruntime")] for extra, needed in extras.items()
    }
    assert not any(each.startswith("onnxruntime") for each in base)
    assert {extra: needed for extra, needed in brought.items() if needed} == {
        "cpu": ["onnxruntime>=1.31"],
        "gpu": ["onnxruntime-gpu[cuda,cudnn]>=1.31"],
    }
