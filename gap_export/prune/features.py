"""What a vision tower shows a pruner: one list of fields, for tensor code and for its twin in float64 NumPy.

Shape letters: N visual tokens, T = 1 + N, A attention heads, D head width, E tower width, H decoder width, P width of the space that a
CLIP tower shares with its text tower. Tensors of the vision graph have a batch B before these, arrays of the twin are of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array")

Extent = Any
"""A whole number: known, symbolic while a graph is traced (an extent of an input), or [1] int64 (computed from an input)."""


@dataclass(frozen=True)
class Grid:
    """A grid that tokens of an image lie on, row by row.

    Attributes:
        rows: of it.
        columns: of it.
        count: as many such grids one behind the other: tiles.
    """

    rows: Extent
    columns: Extent
    count: Extent = 1


class OnDemand(Generic[Array]):
    """A field that may be given as a function, which is called when the field is first read.

    So a graph holds only what its pruner reads, at the place where it is read.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Array | None:
        if instance is None:
            return None  # the default of the field
        value: Any = instance.__dict__[self._name]
        if callable(value):
            value = instance.__dict__[self._name] = value()
        found: Array | None = value
        return found

    def __set__(self, instance: object, value: Array | Callable[[], Array | None] | None) -> None:
        instance.__dict__[self._name] = value


@dataclass(frozen=True)
class VisionFeatures(Generic[Array]):
    """What a vision tower shows a pruner. A family fills in what it has; the rest is None.

    The feature layer is the one whose output the decoder gets; the following layer is the next one up, which the decoder
    never sees, or the feature layer, where the tower ends at it. In a tower where most layers attend within windows both are the last
    layer that attends to all.

    What is said of a patch is said of a visual token, where several patches become one: its `attention` and keys are the means of
    theirs, its `full_width_attention`, which weighs features, is the sum.

    Attributes:
        patches: [N, E] output of the feature layer, before the projector, class token dropped; or after the projector, where no vector
            before it stands for a token.
        grid: (rows, columns) with rows * columns = N; None where images differ in how many patches they have.
        grids: those that the N tokens lie on, one behind the other, where they lie on several, or images differ.
        attention: [N] float32, attention to every patch in the feature layer, mean over heads. That of the class token: softmax over
            class token and patches, class column dropped without renormalising (`class_attention`). In a tower without one, that of
            all patches, mean over them (`received_attention`).
        class_token: [E] output of the feature layer at the class token; None where the decoder cannot take it.
        mean_keys: [N, D] float32, keys of the patches in the feature layer, mean over heads.
        full_width_attention: [N] as `attention`, in the following layer, heads not split (PruMerge, arXiv 2403.15388).
        full_width_keys: [N, E] float32, keys of the patches in the following layer, full width.
        projected: [N, H] the patches after the projector.
        embeds: [N, (1 + deepstack_levels) * H] the patches as they enter the decoder, where that is what pruners add up: a projector
            that joins several patches is not linear, and features of DeepStack belong to their token. None where they add up `patches`.
        aligned: [N, P] the patches in the space shared with text: CLIP's `visual_projection(post_layernorm(patches))`, not
            normalised; where the decoder's token embedding reads the text, the directions of `projected`. None where nothing reads it.
        text: [P] the expression in that space: CLIP's `text_embeds` before normalisation, or the direction of the mean of its
            tokens' embeddings. None where nothing reads it.
        tile: [N] int64, the same for all images of a batch: which tile saw each patch; None where one saw all.
        aligned_inversely: whether a patch is *less* similar to the text that describes it than other patches are. So it is
            in OpenAI's CLIP, which was trained on whole images (CLIP Surgery, arXiv 2304.05653).
    """

    patches: Array
    grid: tuple[int, int] | None
    grids: tuple[Grid, ...] = ()
    attention: OnDemand[Array] = OnDemand()
    class_token: OnDemand[Array] = OnDemand()
    mean_keys: OnDemand[Array] = OnDemand()
    full_width_attention: OnDemand[Array] = OnDemand()
    full_width_keys: OnDemand[Array] = OnDemand()
    projected: OnDemand[Array] = OnDemand()
    embeds: OnDemand[Array] = OnDemand()
    aligned: OnDemand[Array] = OnDemand()
    text: OnDemand[Array] = OnDemand()
    tile: OnDemand[Array] = OnDemand()
    aligned_inversely: bool = True

    @property
    def visual_tokens(self) -> int:
        """N. A plain number, or symbolic while a graph is traced in which images differ."""
        if self.grid is not None:
            return self.grid[0] * self.grid[1]
        patches: Any = self.patches
        visual: int = patches.shape[-2]
        return visual

    @property
    def laid_out(self) -> tuple[Grid, ...]:
        """The grids that all tokens lie on.

        Raises:
            ValueError: they lie on none.
        """
        grids = self.grids or (() if self.grid is None else (Grid(*self.grid),))
        if not grids:
            raise ValueError("the pruner needs tokens that lie on grids")
        return grids

    @property
    def added_up(self) -> Array:
        """What pruners that merge make tokens of."""
        embeds = self.embeds
        return self.patches if embeds is None else embeds


def changed(features: VisionFeatures[Array], **changes: Any) -> VisionFeatures[Array]:
    """Features with some fields of them others. Those that are computed when they are read still are, as `dataclasses.replace` would not leave them.

    Args:
        features: of a batch or an image.
        changes: fields by their names.
    """
    stored = {field.name: vars(features)[field.name] for field in fields(features)}
    return type(features)(**stored | changes)


def class_attention(query_BAD: Tensor, keys_BATD: Tensor) -> Tensor:
    """One row of an attention map, and no other: the class token's, without its own column, mean over heads.

    Args:
        query_BAD: of the class token.
        keys_BATD: class token first.

    Returns:
        [B, N] float32.
    """
    scale = query_BAD.shape[-1] ** -0.5
    logits_BAT = (keys_BATD.float() @ query_BAD.float()[..., None])[..., 0] * scale
    scores_BN: Tensor = logits_BAT.softmax(dim=-1).mean(dim=1)[:, 1:]
    return scores_BN


def received_attention(query_BAND: Tensor, keys_BAND: Tensor) -> Tensor:
    """How much every patch is looked at by all patches of its image, mean over heads and over those that look.

    One head after the other: all maps at once are A * N * N large.

    Returns:
        [B, N] float32; a row adds up to one.
    """
    scale = query_BAND.shape[-1] ** -0.5
    heads = []
    for query_BND, keys_BND in zip(query_BAND.float().unbind(1), keys_BAND.float().unbind(1), strict=True):
        map_BNN = (query_BND * scale @ keys_BND.transpose(1, 2)).softmax(dim=-1)
        heads.append(map_BNN.mean(dim=1))
    scores_BN: Tensor = sum(heads[1:], heads[0]) / len(heads)
    return scores_BN


def mean_keys(keys_BATD: Tensor) -> Tensor:
    """[B, N, D] float32: keys of the patches, mean over heads; class token first in `keys_BATD`."""
    return keys_BATD[:, :, 1:].float().mean(dim=1)
