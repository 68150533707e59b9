"""The environments of other exporters: python bench/exporters/environment.py [--scratch FOLDER]

Two, because optimum's ONNX export wants transformers 4 and the others want 5. Made once; lint_exporters.py says so where they are missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SCRATCH = Path(tempfile.gettempdir()) / "gap-export-bench"
TORCH = "torch==2.13.0"
"""Goes first and alone: asked for by another package, it would arrive in another build."""
ENVIRONMENTS = {
    "exporters-five": [
        "transformers==5.23.0",
        "mobius-onnx==0.1.0",
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.31.1",
        "onnx==1.23.2",
        "onnxscript==0.7.2",
    ],
    "exporters-four": ["optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.31.1", "onnx==1.23.2"],
}
EXPORTERS = {
    "transformers": "exporters-five",
    "genai": "exporters-five",
    "mobius": "exporters-five",
    "torch": "exporters-five",
    "optimum": "exporters-four",
}
"""Exporter -> its environment."""


def python_of(scratch: Path, environment: str) -> Path:
    """The interpreter of an environment."""
    return scratch / environment / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    scratch = parser.parse_args().scratch
    for name, packages in ENVIRONMENTS.items():
        python = python_of(scratch, name)
        if not python.exists():
            venv.create(python.parent.parent, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for wanted in ([TORCH], [TORCH, *packages]):
            subprocess.run([*install, *wanted], check=True)
        print(f"ready: {python}")


if __name__ == "__main__":
    sys.exit(main())
