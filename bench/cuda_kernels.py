"""Which operators does ONNX Runtime's CUDA provider have kernels for? See docs/cuda_kernels.md, which is made from the record.

    python bench/cuda_kernels.py

Needs onnxruntime-gpu of the pinned version with its libraries (`pip install 'onnxruntime-gpu[cuda,cudnn]'`, in an environment of its own), and no GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import harness
from onnx import defs

OPSET = 24
"""Of our graphs."""
PROVIDER = "CUDAExecutionProvider"
_OPEN = 2**31 - 1
"""Last version of a kernel that has no later one."""


def main() -> int:
    options = harness.parser_of(__doc__).parse_args()
    import onnxruntime
    from onnxruntime.capi import _pybind_state

    onnxruntime.preload_dlls()
    if PROVIDER not in onnxruntime.get_available_providers():
        raise SystemExit(f"onnxruntime {onnxruntime.__version__} has no {PROVIDER}: install onnxruntime-gpu")
    found = kernels(_pybind_state.get_all_opkernel_def())
    if not found:
        raise SystemExit(f"{PROVIDER} lists no kernel: its libraries (CUDA, cuDNN) are not installed")
    measured = {"onnxruntime_gpu": onnxruntime.__version__, "opset": OPSET, "kernels": found}
    return harness.finish("cuda_kernels", measured, label=options.label, ok=True)


def kernels(definitions: list[Any]) -> dict[str, dict[str, list[str]]]:
    """Operator -> name of a type in its schema -> element types that it may be, of kernels that fit the opset.

    A kernel fits an operator whose version at this opset is the kernel's first, or lies within its versions where they end. Of several kernels that fit, the types
    are put together.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for each in definitions:
        if each.provider != PROVIDER or each.domain not in ("", "ai.onnx") or not defs.has(each.op_name):
            continue
        version = defs.get_schema(each.op_name, OPSET, "").since_version
        first, last = each.version_range
        if not (first == version or (first < version <= last and last != _OPEN)):
            continue
        types = found.setdefault(each.op_name, {})
        for name, allowed in each.type_constraints.items():
            types[name] = sorted({*types.get(name, []), *map(_element, filter(_is_tensor, allowed))})
    return dict(sorted(found.items()))


def _is_tensor(text: str) -> bool:
    return text.startswith("tensor(")


def _element(text: str) -> str:
    """`float16` of `tensor(float16)`, as specs call it."""
    name = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


if __name__ == "__main__":
    sys.exit(main())
