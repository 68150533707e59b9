"""The environment of the peers that cannot share ours: python bench/peers/environment.py [--scratch FOLDER]

Made once; run.py says so where it is missing. llama.cpp is compiled for the processor that this runs on (GGML_NATIVE), and again where it came from another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import harness  # noqa: E402

LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Compiled here: what its libraries may use is decided when they are compiled."""
_INSTRUCTIONS = {
    "AVX2": "avx2",
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
}
"""What llama.cpp calls instruction sets -> what Linux does."""
TORCH = "torch==2.13.0"
"""Goes first and alone: asked for by another package, it would arrive in another build."""


def python_of(scratch: Path) -> Path:
    """The interpreter of the environment."""
    return scratch / "peers-environment" / "bin" / "python"


def system_info(scratch: Path) -> str:
    """What llama.cpp says that it was compiled with; empty where it is not there, or does not even start."""
    script = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    child = subprocess.run([str(python_of(scratch)), "-c", script], capture_output=True, text=True)
    return child.stdout.strip() if child.returncode == 0 else ""


def instructions_lacking(info: str, flags: frozenset[str]) -> list[str]:
    """Instruction sets that llama.cpp was compiled with and the processor does not have.

    Args:
        info: of `system_info`.
        flags: of the processor.
    """
    compiled = {part.partition("=")[0].split(":")[-1].strip() for part in info.split("|") if "= 1" in part}
    return sorted(name for name, flag in _INSTRUCTIONS.items() if name in compiled and flag not in flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=harness.SCRATCH)
    scratch = parser.parse_args().scratch
    python = python_of(scratch)
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
    pip = [str(python), "-m", "pip"]
    install = [*pip, "install", "--quiet", "--disable-pip-version-check"]
    for wanted in ([TORCH], [TORCH, "--requirement", str(HERE / "requirements.txt")]):
        subprocess.run([*install, *wanted], check=True)
    # optimum-intel brings it, no peer uses it, and beside torch's CPU build PyPI's does not import, nor then transformers.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    found, flags = system_info(scratch), harness.processor_flags()
    if not found or instructions_lacking(found, flags):
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "llama-cpp-python"], check=True)
        # No wheel of others, and none from pip's cache, which may have been filled on another machine.
        surroundings = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        compiling = [*install, "--no-cache-dir", "--no-binary", "llama-cpp-python", LLAMA_CPP]
        subprocess.run(compiling, env=surroundings, check=True)
        found = system_info(scratch)
    if not found or instructions_lacking(found, flags):
        raise SystemExit(
            f"{LLAMA_CPP} was compiled and does not run on this processor: {found or 'no answer'}"
        )
    print(f"llama.cpp, compiled for this processor: {found}")
    print(f"ready: {python}")


if __name__ == "__main__":
    sys.exit(main())
