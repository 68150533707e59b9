"""What can be said of each family without a checkpoint at hand: for `gap-export models`, which imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export import prune
from gap_export.bundle.manifest import BoxFormat, VisionFeature


@dataclass(frozen=True)
class Overview:
    """One family.

    Attributes:
        box: how boxes are written.
        missing_features: see `ModelSpec.missing_features`.
        differs: whether images differ in how many visual tokens they have.
        reads_text: whether a CLIP text tower can be put beside the vision tower.
    """

    box: BoxFormat
    missing_features: tuple[VisionFeature, ...] = ()
    differs: bool = False
    reads_text: bool = True

    @property
    def pruners(self) -> tuple[str, ...]:
        """The strategies that work."""
        return tuple(
            row.name
            for row in prune.STRATEGIES
            if not set(row.needs) & set(self.missing_features)
            and (self.reads_text or not row.needs_text)
            and not (self.differs and row.where == "inside the decoder")
        )


_PADDED = BoxFormat(codec="llava", frame="padded_square")
_NO_CLASS_TOKEN: tuple[VisionFeature, ...] = (
    "class_token",
    "projected_class_token",
    "following_layer",
    "grid",
)


def _native(codec: str) -> Overview:
    """The Qwen-VL models."""
    box = BoxFormat(codec=codec, frame="image")
    return Overview(box, _NO_CLASS_TOKEN, differs=True, reads_text=False)


OVERVIEW = {
    "internvl": Overview(
        BoxFormat(codec="internvl", frame="image"),
        ("projected_class_token", "following_layer", "grid"),
        differs=True,
        reads_text=False,
    ),
    "llava": Overview(_PADDED),
    "llava_next": Overview(_PADDED, ("grid",), differs=True),
    "llava_onevision": Overview(
        BoxFormat(codec="llava", frame="image"), _NO_CLASS_TOKEN, differs=True, reads_text=False
    ),
    "llava_original": Overview(_PADDED),
    "minigpt_v2": Overview(
        BoxFormat(codec="minigpt_v2", frame="image"),
        ("projected_class_token", "following_layer"),
        reads_text=False,
    ),
    "qwen2_5_vl": _native("qwen2_5_vl"),
    "qwen2_vl": _native("qwen2_vl"),
    "qwen3_vl": _native("qwen3_vl"),
    "shikra": Overview(BoxFormat(codec="shikra", frame="padded_square")),
}
"""Family -> what there is to know. A recipe may ask for less: `fit` moves the frame of boxes."""
