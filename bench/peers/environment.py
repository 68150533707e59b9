"""The environment of the peers that cannot share ours: python bench/peers/environment.py [--scratch FOLDER]

Made once; run.py says so where it is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRATCH = Path(tempfile.gettempdir()) / "gap-export-bench"
TORCH = "torch==2.13.0"
"""Goes first and alone: asked for by another package, it would arrive in another build."""


def python_of(scratch: Path) -> Path:
    """The interpreter of the environment."""
    return scratch / "peers-environment" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    python = python_of(parser.parse_args().scratch)
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for wanted in ([TORCH], [TORCH, "--requirement", str(HERE / "requirements.txt")]):
        subprocess.run([*install, *wanted], check=True)
    # optimum-intel brings it, no peer uses it, and beside torch's CPU build PyPI's does not import, nor then transformers.
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    print(f"ready: {python}")


if __name__ == "__main__":
    sys.exit(main())
