"""What the text tower learns from: patches as the frozen vision tower gives them, expressions, and which patch shows what.

The scenes are those of the bank of `training.shapes` (its training split). Nothing of the vision tower is trained here, so its
patches are computed once and kept on disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from training.clip_shapes.vocabulary import ANY, named_kinds, text_ids
from training.shapes.data import NO_OBJECT, QUESTION_LEN, Bank
from training.shapes.model import HIDDEN, IMAGE_MEAN, IMAGE_STD, PATCHES
from training.shapes.vocabulary import VOCABULARY

FEATURE_BATCH = 64


@dataclass(frozen=True)
class Pairs:
    """Views (V) of scenes with their expressions, of which there are U different ones.

    patches [V, 144, 128] float16, memory-mapped; kinds [V, 6, 3] uint8, counts [V] uint8, owner [V, 144] uint8 as in `Bank`;
    texts [U, 24] int64 token ids; named [U, 2, 3] int64, what each text names; expressions [V, Q] int64, rows of `texts`.
    """

    patches: NDArray[np.float16]
    kinds: NDArray[np.uint8]
    counts: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    texts: NDArray[np.int64]
    named: NDArray[np.int64]
    expressions: NDArray[np.int64]

    @property
    def views(self) -> int:
        return len(self.owner)


@torch.no_grad()
def patch_features(model: LlavaForConditionalGeneration, pixels_BHWC: NDArray[np.uint8]) -> Tensor:
    """What `visual_projection` is applied to: post_layernorm(hidden_states[-2][:, 1:]), [B, 144, 128] float32."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).permute(0, 3, 1, 2).float() / 255
    tower = model.model.vision_tower
    states = tower((pixels - IMAGE_MEAN[0]) / IMAGE_STD[0], output_hidden_states=True).hidden_states
    patches: Tensor = tower.post_layernorm(states[model.config.vision_feature_layer][:, 1:])
    return patches


def fingerprint(module: nn.Module) -> str:
    """Changes with any weight of the module."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def cache_patches(model: LlavaForConditionalGeneration, bank: Bank, folder: Path) -> NDArray[np.float16]:
    """Patches of every view of the bank, memory-mapped; computed unless they are there, of this very tower."""
    path, done = folder / "patches.npy", folder / "patches-complete"
    stamp = f"{bank.views} {fingerprint(model.model.vision_tower)}"
    if not (done.exists() and done.read_text() == stamp):
        done.unlink(missing_ok=True)
        array = np.lib.format.open_memmap(path, "w+", np.float16, (bank.views, PATCHES, HIDDEN))
        for start in track(range(0, bank.views, FEATURE_BATCH), description="patches"):
            views = np.arange(start, min(start + FEATURE_BATCH, bank.views))
            array[views] = patch_features(model, bank.view_pixels(views)).numpy()
        array.flush()
        done.write_text(stamp)
    patches: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return patches


def pairs_from_bank(bank: Bank, patches: NDArray[np.float16]) -> Pairs:
    """The pairs of a bank; its expressions are read back from the questions it stores."""
    expressions = np.array(
        [
            [expression_of(turn, int(padding)) for turn, padding in zip(turns, paddings, strict=True)]
            for turns, paddings in zip(bank.turns, bank.padding, strict=True)
        ]
    )
    different, rows = np.unique(expressions, return_inverse=True)
    return Pairs(
        patches=patches,
        kinds=bank.kinds,
        counts=bank.counts,
        owner=bank.owner,
        texts=np.array(text_ids(different.tolist())),
        named=np.array([named_kinds(expression) for expression in different]),
        expressions=rows.reshape(expressions.shape),
    )


def expression_of(turn: NDArray[np.uint8], padding: int) -> str:
    """The expression in a question of the bank: "where is {expression} ? assistant :" behind its padding."""
    return " ".join(VOCABULARY[token] for token in turn[padding + 2 : QUESTION_LEN - 3])


def fitting(
    kinds_BO3: NDArray[np.uint8], counts_B: NDArray[np.uint8], named_T23: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which objects fit what a text names, for either of its two names: [T, 2, B, O]."""
    said = named_T23[:, :, None, None]
    alike = ((said == ANY) | (said == kinds_BO3)).all(-1)
    exists = np.arange(kinds_BO3.shape[1]) < counts_B[:, None]
    both: NDArray[np.bool_] = alike & exists
    return both


def shows_named(owner_BN: NDArray[np.uint8], fits_BO: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which patches lie on an object that fits: [B, N]."""
    on_object = owner_BN != NO_OBJECT
    index = np.where(on_object, owner_BN, 0).astype(np.int64)
    return np.take_along_axis(fits_BO, index, axis=1) & on_object
