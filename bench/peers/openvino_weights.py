"""Weights of few bits as NNCF makes them, and what asks OpenVINO for fp32."""

from __future__ import annotations

from typing import Any

import nncf

FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""Arithmetic and cache."""
_MODES = {
    "int8": nncf.CompressWeightsMode.INT8_ASYM,
    "int4_sym": nncf.CompressWeightsMode.INT4_SYM,
    "int4_asym": nncf.CompressWeightsMode.INT4_ASYM,
}


def compressed(model: Any, kind: str, group: int) -> Any:
    """A model with its weights in `kind`; those of four bits in groups of so many, 0 for one scale per row."""
    sized = {} if kind == "int8" else {"group_size": group or -1, "ratio": 1.0}
    return nncf.compress_weights(model, mode=_MODES[kind], **sized)
