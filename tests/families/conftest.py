"""Checkpoints with random weights of the families in `tiny_families.FAMILIES`, and bundles of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.families.answers import Tiny
from tests.families.tiny_families import FAMILIES, TinyFamily

if TYPE_CHECKING:
    from gap_export.graph.trace_cache import Tracer


def save_checkpoint(folder: Path, family: TinyFamily, tokenizer: Path) -> Path:
    """Random weights, large enough that attention is sharp: a wrong position must show in the logits."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True)
    config = json.dumps(dict(family.config))
    (folder / "config.json").write_text(config)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.8 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            centre = 0.0 if parameter.dim() > 1 else float(parameter.mean() > 0.5)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(config)  # transformers wrote more than is published
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(family.processor)))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def tiny_family(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tracer: Tracer
) -> Callable[[str], Tiny]:
    """`tiny_family(name)`: a checkpoint of `FAMILIES`, made on first use."""
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tokenizer = tiny_checkpoint / "tokenizer.json"
            checkpoint = save_checkpoint(folder / "checkpoint", FAMILIES[name], tokenizer)
            made[name] = Tiny(FAMILIES[name], checkpoint, folder, tracer)
        return made[name]

    return make
