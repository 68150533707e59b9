"""What all parts of the measurement on a GPU are told: the device, the model, how many cases and rounds, and where things lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import LLAVA_7B, LLAVA_135M

from gap_export.bundle.folder import Bundle
from gap_export.pipeline.build import build_bundle
from gap_export.recipe.recipe import load_recipe

KEEPS = "0.1:0.25:1"
"""Shares of visual tokens that requests may choose: one bundle serves all that are measured."""
LARGEST_BATCH = 8
CONFIGS: dict[str, dict[str, Any]] = {"7b": LLAVA_7B, "135m": LLAVA_135M}
"""Of random weights; the third model, `shapes`, is the bundled one."""


@dataclass(frozen=True)
class Settings:
    """Of all parts.

    Attributes:
        model: whose speed is measured: `7b`, `135m` or `shapes`.
        precision: of that model, and of engines.
        device: of torch and, as it spells it, of ONNX Runtime: `cuda`, or `cpu` to try the script.
        scratch: folder of checkpoints and bundles.
        cases: held-out cases of `validate`.
        peer_cases: of them, answered by transformers on the device too.
        rounds: measured, in which all candidates answer.
        new_tokens: of each answer.
    """

    model: str
    precision: str
    device: str
    scratch: Path
    cases: int = 128
    peer_cases: int = 16
    rounds: int = 12
    new_tokens: int = 32

    @property
    def onnxruntime(self) -> str:
        """ONNX Runtime on the device, as `open_session` takes it."""
        return "onnxruntime" if self.device == "cpu" else f"onnxruntime:{self.device}"

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the random weights; None for the bundled model."""
        return None if self.model == "shapes" else self.scratch / f"llava-{self.model}"

    def bundle_folder(self, target: str) -> Path:
        """Of the model whose speed is measured."""
        return self.scratch / f"gpu-{self.model}-{target}"

    def build_bundled(self, target: str, precision: str) -> Bundle:
        """The bundled model, which grounds: for parity."""
        recipe = load_recipe("shapes").replaced(keep=KEEPS, precision=precision, **_made_for(target))
        return build_bundle(
            recipe, self.scratch / f"gpu-parity-{target}-{precision}", replace=True, golden=False
        )

    def build_measured(self, target: str) -> Bundle:
        """The model whose speed is measured; its weights are there."""
        changes: dict[str, Any] = {
            "keep": KEEPS,
            "precision": self.precision,
            "max_batch": LARGEST_BATCH,
            **_made_for(target),
        }
        if self.checkpoint is not None:
            changes |= {"checkpoint": str(self.checkpoint), "max_new_tokens": max(64, self.new_tokens)}
        recipe = load_recipe("shapes" if self.checkpoint is None else "llava")
        return build_bundle(
            recipe.replaced(**changes), self.bundle_folder(target), replace=True, golden=False
        )


def _made_for(target: str) -> dict[str, Any]:
    """Changes of a recipe: graphs, and engines for the GPU at hand."""
    if target == "onnx":
        return {"targets": ("onnx",)}
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"targets": ("onnx", target), "compute_capabilities": (f"{major}.{minor}",)}
