"""Who answers, and how: a row per mode, in two parts.

`fp32`: everybody computes in fp32, so that tokens are the same. `best`: everybody in each mode that its users would choose for speed; a peer that knows fp32 alone
is here too. How far a mode is from fp32 was measured by `bench/real_weights.py` on a decoder that was trained, and every mode names its row there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BUNDLE = "BUNDLE"
"""Stands for an unpruned bundle of ours: the tower of peers that export none."""
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
PRUNED = 0.25


@dataclass(frozen=True)
class Mode:
    """One that answers.

    Attributes:
        name: unique in its part.
        command: script and its own arguments.
        loss: row of `results/real_weights.json` with its KL from fp32, as (side, name); None where arithmetic is fp32, of which it is 0.
        ours: gap-export, and not a peer.
        keep: share of the visual tokens; peers prune nothing.
        through_openvino: ours, with OpenVINO reading images and prompts.
        elsewhere: runs in the environment that environment.py makes.
        needs_bf16: makes no sense, or is refused, on a processor without bf16.
    """

    name: str
    command: tuple[str, ...]
    loss: tuple[str, str] | None = None
    ours: bool = False
    keep: float = 1.0
    through_openvino: bool = False
    elsewhere: bool = False
    needs_bf16: bool = False


def _ours(
    name: str, keep: float, *, positions: str = "gap", precision: str = "fp32", backend: str = "onnxruntime"
) -> Mode:
    row = precision if backend == "onnxruntime" else f"{precision} in {backend}"
    return Mode(
        name,
        ("ours.py", str(keep), positions, precision, backend),
        loss=None if row == "fp32" else ("gap_export", row),
        ours=True,
        keep=keep,
        through_openvino=backend.startswith("openvino"),
        needs_bf16=backend.endswith(":bf16"),
    )


def _peer(
    name: str, *command: str, loss: str = "", elsewhere: bool = False, needs_bf16: bool = False
) -> Mode:
    return Mode(name, command, ("peers", loss) if loss else None, elsewhere=elsewhere, needs_bf16=needs_bf16)


_SDPA = _peer("transformers sdpa", "transformers_peer.py", "sdpa")
_EXPORTER = _peer("transformers exporter", "exported_decoder_peer.py", "transformers", BUNDLE)
_MOBIUS = _peer("mobius", "exported_decoder_peer.py", "mobius", BUNDLE, elsewhere=True)
_OURS = tuple(
    (precision, backend)
    for backend, precisions in {
        "onnxruntime": ("fp32", "int8", "int8-blocks", "int4"),
        "openvino:bf16": ("fp32", "int8-blocks", "int4"),
    }.items()
    for precision in precisions
)
PARTS: dict[str, tuple[Mode, ...]] = {
    "fp32": (
        _ours("gap@0.25", PRUNED),
        _ours("shifted@0.25", PRUNED, positions="shifted"),
        _ours("ours@1.0", 1.0),
        _peer("transformers eager", "transformers_peer.py", "eager"),
        _SDPA,
        _peer("transformers compile", "transformers_peer.py", "compile"),
        _EXPORTER,
        _MOBIUS,
        _peer("openvino", "openvino_peer.py", "fp32", elsewhere=True),
        _peer("llama.cpp", "llama_cpp_peer.py", "f32", BUNDLE, elsewhere=True),
    ),
    "best": (
        *(
            _ours(
                f"ours {precision}{'' if backend == 'onnxruntime' else f' in {backend}'}@{keep}",
                keep,
                precision=precision,
                backend=backend,
            )
            for keep in (1.0, PRUNED)
            for precision, backend in _OURS
        ),
        _SDPA,
        _peer("transformers bf16", "transformers_peer.py", "bf16", loss="transformers bf16", needs_bf16=True),
        _EXPORTER,
        _MOBIUS,
        _peer(
            "openvino default", "openvino_peer.py", "default", loss="OpenVINO, its default", elsewhere=True
        ),
        _peer(
            "openvino int8", "openvino_peer.py", "int8", loss="OpenVINO, its default, int8", elsewhere=True
        ),
        _peer(
            "openvino int4", "openvino_peer.py", "int4", loss="OpenVINO, its default, INT4_ASYM, 32", elsewhere=True
        ),
        _peer("llama.cpp q8_0", "llama_cpp_peer.py", "q8_0", BUNDLE, loss="llama.cpp Q8_0", elsewhere=True),
        _peer(
            "llama.cpp q4_k", "llama_cpp_peer.py", "q4_k_m", BUNDLE, loss="llama.cpp Q4_K_M", elsewhere=True
        ),
    ),
}  # fmt: skip


def skipped(modes: Sequence[Mode], flags: frozenset[str]) -> dict[str, str]:
    """Modes that this processor cannot be asked for -> why.

    Args:
        modes: of a part.
        flags: of the processor.
    """
    why = f"the processor has none of {', '.join(sorted(BF16_FLAGS))}"
    return {mode.name: why for mode in modes if mode.needs_bf16 and not flags & BF16_FLAGS}


def losses(modes: Sequence[Mode], record: Mapping[str, Any]) -> dict[str, float]:
    """Mean KL from fp32 of every mode, in nats per token; of ours the larger of one long call and of token by token.

    Args:
        modes: of a part.
        record: `results/real_weights.json`.

    Raises:
        SystemExit: it lacks a row.
    """
    missing = sorted(
        {mode.loss[1] for mode in modes if mode.loss and mode.loss[1] not in record[mode.loss[0]]}
    )
    if missing:
        raise SystemExit(
            f"results/real_weights.json has no row {'; '.join(missing)}: run `python bench/real_weights.py`"
        )
    return {
        mode.name: 0.0 if mode.loss is None else _loss(record[mode.loss[0]][mode.loss[1]]) for mode in modes
    }


def _loss(row: Mapping[str, Any]) -> float:
    if "mean_kl" in row:
        return float(row["mean_kl"])
    return max(float(row[part]["mean_kl"]) for part in ("prefill", "steps"))
