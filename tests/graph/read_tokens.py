"""Tokens fed to the decoder of a bundle as they stand, with the logits of one row or of every row.

Shape letters: B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.graph.every_row import with_every_row
from gap_export.positions import Ids, Placement
from gap_export.runtime.ort import Layout, OnnxRuntimeSession


class Reader(OnnxRuntimeSession):
    """The embedding and the decoder of a bundle.

    Args:
        bundle: that drops no tokens inside the decoder.
        every_row: whether the decoder is changed to give them all.
    """

    def __init__(self, bundle: Bundle, *, every_row: bool) -> None:
        self._every_row = every_row
        super().__init__(bundle, threads=1, only=("embed", "decoder"))

    def read(self, ids_BS: Ids, last: Sequence[int], *, slots: int = 64) -> NDArray[np.float32]:
        """Feed tokens into an empty cache.

        Args:
            ids_BS: of them.
            last: of every row the token whose logits are asked for.
            slots: of the cache.

        Returns:
            [B, S, V] of every row, or [B, V].
        """
        manifest, (batch, count) = self._bundle.manifest, ids_BS.shape
        self._lay_out(Layout(batch, (slots,) * len(manifest.cache_layout.runs)))
        positions = np.broadcast_to(np.arange(count), (batch, count)).astype(np.int64)
        ends = np.array(last, np.int64)
        placement = Placement(
            position_ids=np.stack([positions] * 3) if manifest.spec.position_rows == 3 else positions,
            write_index=np.zeros(batch, np.int64),
            last_index=ends,
            next_position=ends + 1,
            next_slot=ends + 1,
            image_slots=np.zeros((batch, manifest.prompt.images, 2), np.int64),
        )
        (embeds,) = self._run("embed", {"input_ids": ids_BS})
        rows = count if self._every_row else 1
        logits = np.full((batch * rows, manifest.spec.vocabulary), np.nan, np.float32)
        self._execute(
            "decoder",
            self._decoder_binding(
                "decoder", self._cache.views(), embeds, placement.decoder_inputs(), {"logits": logits}
            ),
        )
        return logits.reshape(batch, count, -1) if self._every_row else logits

    def _model_of(self, name: str, options: ort.SessionOptions) -> str | bytes:
        if name != "decoder" or not self._every_row:
            return super()._model_of(name, options)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._bundle.folder)
        )
        return with_every_row(self._bundle.graph_path(name))


def off(bundle: Bundle, ids_BS: Ids, lasts: Sequence[Sequence[int]], **options: Any) -> float:
    """By how much the rows that are asked for differ from those that the decoder of the bundle gives."""
    own, every = (Reader(bundle, every_row=each) for each in (False, True))
    batch = np.arange(len(ids_BS))
    return float(
        max(
            np.abs(every.read(ids_BS, last, **options)[batch, last] - own.read(ids_BS, last, **options)).max()
            for last in lasts
        )
    )


def off_prefixes(bundle: Bundle, ids_1S: Ids, **options: Any) -> float:
    """By how much rows differ from the last rows of what was read up to them, and no further."""
    own, every = (Reader(bundle, every_row=each) for each in (False, True))
    count = ids_1S.shape[1]
    rows_SV = every.read(ids_1S, [count - 1], **options)[0]
    alone_SV = [own.read(ids_1S[:, : row + 1], [row], **options)[0] for row in range(count)]
    return float(np.abs(rows_SV - np.stack(alone_SV)).max())
