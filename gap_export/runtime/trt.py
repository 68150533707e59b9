"""A bundle in TensorRT or TensorRT-RTX: engines, one stream, one cache, nothing allocated per token.

Position ids and write index are two inputs of the decoder and are copied to the device for every call, as they are. The
cache is one buffer per layer and part, bound as past and as present. Prompts and single tokens run under different
optimisation profiles of the same engine (`engine/profiles.py`), or, where the decoder drops tokens, in two engines over one
cache.

Rows of requests that come and go are parts of the same buffers: a prompt is read by a call of one row whose past and present are bound to
where that row lies, and single tokens of all rows by a call of so many. Both lie within the profiles, which take from one row to as many as
the recipe says, and every row has all slots, as the length of a cache is static.

Embeddings stay on the device: `encode` and `splice` hand out `DeviceTensor`s, whose memory goes back to the session's pool
when they are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import EngineTarget
from gap_export.bundle.spec import GraphName
from gap_export.engine.buffers import to_wire
from gap_export.engine.device import Device
from gap_export.engine.inspect import check_engine, open_engine
from gap_export.engine.library import load_library
from gap_export.errors import SessionError
from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids, Placement, placement_from_splice
from gap_export.runtime.session import (
    KEPT_COUNTS,
    KEPT_SLOTS,
    Buffer,
    Lifetime,
    Prefilled,
    Spliced,
    VisualTokens,
    as_many_as_kept,
    check_within_bound,
    kept_of_stages,
    padded_together,
    splice_inputs,
    vision_inputs,
)
from gap_export.runtime.trt_graph import DeviceTensor, LoadedGraph, Pool

_TOKENS = "decoder, one token"
"""A second context of the decoder, where single tokens have their own."""


class TensorRTSession(Lifetime):
    """A bundle's engines in TensorRT or TensorRT-RTX.

    Args:
        bundle: opened and verified.
        target: whose engines to run: `tensorrt-rtx` or `tensorrt`.
        cuda_graphs: launch the decoder's single-token call as one CUDA graph. It then has a context of its own, since whatever
            changes a context after a capture invalidates that; activations take as much memory again.

    Raises:
        SessionError: the bundle holds no engines for this target.
        EngineError: an engine is damaged, of another library version, or of another graph.
        MissingRequirementError: the library, the CUDA runtime, a GPU, or memory on it is missing.
    """

    def __init__(
        self, bundle: Bundle, *, target: EngineTarget = "tensorrt-rtx", cuda_graphs: bool = False
    ) -> None:
        manifest = bundle.manifest
        engines = manifest.engines.get(target, {})
        names: tuple[GraphName, ...] = tuple(graph.spec.name for graph in manifest.graphs.values())
        absent = [name for name in names if name not in engines]
        if absent:
            raise SessionError(
                f"holds no {target} engine for {', '.join(absent)}",
                subject=str(bundle.folder),
                hint=f"build it with --target {target}",
            )
        self.backend: str = target
        self.capacities = manifest.cache_layout.capacities
        # A decoder that drops tokens is two graphs over one cache.
        self._prompt_graph, self._token_graph = (
            ("prefill", "decode") if manifest.pruning.stages else ("decoder", "decoder")
        )
        self._pruning, self._reads_text = manifest.pruning, manifest.text_tower is not None
        library = load_library(target)
        paths = {name: bundle.folder / engines[name].file for name in names}
        for name in names:
            graph_sha256 = manifest.files[manifest.graphs[name].file].sha256
            check_engine(paths[name], engines[name], graph_sha256=graph_sha256, library=library)
        self._device = Device()
        self._pool = Pool(self._device)
        self._graphs: dict[str, LoadedGraph] = {}
        self._token_embeds: DeviceTensor | None = None
        try:
            for name in names:
                opened = open_engine(paths[name], library)
                spec = manifest.graphs[name].spec
                cache_of = self._graphs["prefill"] if name == "decode" else None
                self._graphs[name] = LoadedGraph(
                    spec, opened, library, self._device, cache_of, captures=cuda_graphs and name == "decode"
                )
                if name == "decoder" and cuda_graphs:
                    self._token_graph = _TOKENS
                    self._graphs[_TOKENS] = LoadedGraph(
                        spec, opened, library, self._device, self._graphs[name], captures=True
                    )
        except BaseException:
            self.close()
            raise
        self.most_rows: int | None = self._graphs[self._prompt_graph].most_rows

    def encode(
        self,
        pixels: PixelInputs,
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        """Vision tower, pruner and projector; the embeddings are a `DeviceTensor`, padded to the bound where images differ."""
        vision, pruning = self._graph("vision"), self._pruning
        extra = vision_inputs(
            pruning, reads_text=self._reads_text, text_ids_BL=text_ids_BL, keep_count=keep_count
        )
        vision.prepare({**pixels, **extra})
        embeds = self._tensor(vision, "visual_embeds")
        vision.run({"visual_embeds": embeds.address})
        kept_BK = vision.download("kept_indices")
        if not pruning.finds_count:
            return VisualTokens(embeds=embeds, kept_indices=kept_BK)
        counts_B = vision.download(KEPT_COUNTS)
        if pruning.keep_mode == "bounded":  # one image; many of them are put together on the host
            return as_many_as_kept(np.asarray(embeds), kept_BK, counts_B, pruning)
        check_within_bound(counts_B, kept_BK.shape[1], pruning)
        return VisualTokens(embeds=embeds, kept_indices=kept_BK, kept_counts=counts_B)

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings [1, K, H] of the images of every row as one batch [B, longest, H]."""
        self._check_open()
        return padded_together([[np.asarray(part) for part in row] for row in rows], longest)

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder; the embeddings are a `DeviceTensor`."""
        splice = self._graph("splice")
        seen = self._on_device(splice, "visual_embeds", visual.embeds)
        inputs = splice_inputs(splice.spec, input_ids_BT, visual)
        splice.prepare({**inputs, "visual_embeds": seen})
        embeds = self._tensor(splice, "inputs_embeds")
        splice.run({"visual_embeds": seen.address, "inputs_embeds": embeds.address})
        counters = [tensor.name for tensor in splice.spec.outputs if tensor.name != "inputs_embeds"]
        placement = placement_from_splice(
            {name: splice.download(name) for name in counters}, visual.stage_counts
        )
        return Spliced(embeds=embeds, placement=placement)

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on.

        Raises:
            SessionError: the prompt is longer than the engine or the cache allows, or the batch larger.
        """
        self.caches_begun += 1
        return self._prefill(embeds, placement)

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first."""
        graph = self._graph(self._prompt_graph)
        for row in range(1, rows):
            graph.copy_row(0, row)

    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token.

        Raises:
            SessionError: the cache is full.
        """
        return self.append(self.embed(np.maximum(token_ids_BT, 0)), placement)

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew with a cache of one row in which nothing lies: a slot that holds NaN would count, masked as it is.

        Raises:
            SessionError: the cache has fewer slots.
        """
        self.caches_begun += 1
        self._graph(self._prompt_graph).clear_row(0)
        self.grow(slots)

    def grow(self, slots: Sequence[int]) -> None:
        """The cache has all its slots from the beginning.

        Raises:
            SessionError: it has fewer.
        """
        self._check_open()
        self._check_slots(slots)

    def embed(self, token_ids_1T: Ids) -> Buffer:
        """Embeddings [1, T, H] of text, a `DeviceTensor`."""
        embed = self._graph("embed")
        embed.prepare({"input_ids": token_ids_1T})
        embeds = self._tensor(embed, "inputs_embeds")
        embed.run({"inputs_embeds": embeds.address})
        return embeds

    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what lies in the cache: logits [B, V] of each row's last token.

        Raises:
            SessionError: the cache is full.
        """
        self._check_open()
        return self._append(embeds, placement)

    def open_rows(self, rows: int, slots: int | None = None) -> None:
        """Lay out a cache of so many rows, each with all its slots; see `runtime.rows.RowSession`.

        Raises:
            SessionError: the engines take fewer rows, or a row has fewer slots.
        """
        graph = self._graph(self._prompt_graph)
        if not 1 <= rows <= graph.most_rows:
            raise SessionError(
                f"are not from 1 to {graph.most_rows}, which the engines were built for",
                subject=f"{rows} rows of the cache",
                hint="open fewer, or build with a larger max_batch in the recipe",
            )
        if slots is not None:
            self._check_slots([slots], strict=False)
        self.caches_begun += 1
        for row in range(rows):
            graph.clear_row(row)

    def prefill_row(self, row: int, embeds: Buffer, placement: Placement) -> Prefilled:
        """Fill a row from slot 0 on, with a prompt.

        Raises:
            SessionError: the prompt does not fit, or there is no such row.
        """
        self._check_row(row)
        return self._prefill(embeds, placement, row)

    def append_row(self, row: int, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what is in a row: logits [1, V].

        Raises:
            SessionError: they do not fit, or there is no such row.
        """
        self._check_row(row)
        return self._append(embeds, placement, row)

    def extend_row(self, row: int, token_ids_1T: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed several tokens after what is in a row: logits [1, V].

        Raises:
            SessionError: they do not fit, or there is no such row.
        """
        return self.append_row(row, self.embed(np.maximum(token_ids_1T, 0)), placement)

    def copy_row(self, source: int, target: int) -> None:
        """Give a row what another holds.

        Raises:
            SessionError: there is no such row.
        """
        self._check_row(source)
        self._check_row(target)
        self._graph(self._prompt_graph).copy_row(source, target)

    def clear_row(self, row: int) -> None:
        """Forget what a row holds.

        Raises:
            SessionError: there is no such row.
        """
        self._check_row(row)
        self._graph(self._prompt_graph).clear_row(row)

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V].

        Raises:
            SessionError: the cache is full.
        """
        embed = self._graph("embed")
        embed.prepare({"input_ids": token_ids_B[:, None]})
        if self._token_embeds is None or self._token_embeds.shape[0] != len(token_ids_B):
            self._token_embeds = None  # its memory first goes back, so that the new one can have it
            self._token_embeds = self._tensor(embed, "inputs_embeds")
        embed.run({"inputs_embeds": self._token_embeds.address})
        written = tuple(slot + 1 for slot in (placement.write_index, *placement.stage_write_index))
        return self._decode(self._graph(self._token_graph), self._token_embeds, placement, written)

    def _free(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._token_embeds = None
        self._pool.close()
        self._device.close()

    def _graph(self, name: str) -> LoadedGraph:
        self._check_open()
        return self._graphs[name]

    def _prefill(self, embeds: Buffer, placement: Placement, row: int | None = None) -> Prefilled:
        graph = self._graph(self._prompt_graph)
        logits = self._decode(graph, embeds, placement, placement.slots_of_stages, row)
        slots = [tensor.name for tensor in graph.spec.outputs if tensor.name.startswith(KEPT_SLOTS)]
        return Prefilled(logits, kept_of_stages([graph.download(name) for name in slots], placement))

    def _append(self, embeds: Buffer, placement: Placement, row: int | None = None) -> NDArray[np.float32]:
        written = (placement.write_index + placement.last_index + 1,)
        return self._decode(self._graph(self._prompt_graph), embeds, placement, written, row)

    def _decode(
        self,
        graph: LoadedGraph,
        embeds: Buffer,
        placement: Placement,
        written: tuple[Ids, ...],
        row: int | None = None,
    ) -> NDArray[np.float32]:
        """One call of the decoder, after which `written` slots [B] of every stage are full: of the first rows, or of one row."""
        self._check_slots([int(slots.max()) for slots in written])
        fed = self._on_device(graph, "inputs_embeds", embeds)
        taken = {tensor.name for tensor in graph.spec.inputs}
        numbers = {name: value for name, value in placement.decoder_inputs().items() if name in taken}
        graph.prepare({"inputs_embeds": fed, **numbers})
        graph.run({"inputs_embeds": fed.address} | ({} if row is None else graph.row_addresses(row)))
        return graph.download("logits")

    def _check_row(self, row: int) -> None:
        """Refuse a row that is not there."""
        rows = self._graph(self._prompt_graph).most_rows
        if not 0 <= row < rows:
            raise SessionError(
                f"is not there: the engines were built for {rows}",
                subject=f"row {row}",
                hint="open as many rows as there are requests",
            )

    def _check_slots(self, needed: Sequence[int], *, strict: bool = True) -> None:
        """Refuse what needs more slots, in any stage, than the cache has."""
        for slots, capacity in zip(needed, self.capacities, strict=strict):
            if slots > capacity:
                raise SessionError(
                    f"has {capacity} slots, this call needs {slots}",
                    subject="the cache",
                    hint="ask for fewer new tokens, or build with a larger capacity",
                )

    def _tensor(self, graph: LoadedGraph, name: str) -> DeviceTensor:
        """An output's memory, always of the largest size: prompts of every length can then reuse it."""
        shape, dtype = graph.output_shape(name), graph.dtype(name)
        return DeviceTensor(shape, dtype, self._device, self._pool, nbytes=graph.largest(name))

    def _on_device(self, graph: LoadedGraph, name: str, value: Buffer) -> DeviceTensor:
        """A tensor of this session as it is; an array, say from another runtime, copied to the device."""
        if isinstance(value, DeviceTensor):
            return value
        array = to_wire(np.asarray(value), graph.dtype(name))
        tensor = DeviceTensor(array.shape, graph.dtype(name), self._device, self._pool)
        self._device.upload(tensor.address, array)
        return tensor


def open_rtx(bundle: Bundle, *, threads: int = 0) -> TensorRTSession:
    """Load the engines of TensorRT-RTX; see `TensorRTSession`. Nothing runs on threads of the CPU."""
    return TensorRTSession(bundle, target="tensorrt-rtx")


def open_tensorrt(bundle: Bundle, *, threads: int = 0) -> TensorRTSession:
    """Load the engines of TensorRT; see `TensorRTSession`. Nothing runs on threads of the CPU."""
    return TensorRTSession(bundle, target="tensorrt")
