"""Where every kind of file that the package reads lies among the prepared files, which call reads it, and how it can be damaged."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import yaml

from gap_export.files import kinds
from gap_export.files.kinds import FileKind
from tests.hostile import binaries, graphs, templates, texts
from tests.hostile.nodes import TO_READ
from tests.hostile.texts import Damage


def _json(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    yield from texts.text_damaged(content)
    yield from texts.raw_json_damaged(content)
    yield from texts.json_damaged(content, rng, amount)


def _jsonl(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    yield from texts.text_damaged(content)
    yield from texts.jsonl_damaged(content, rng, amount)


def _yaml(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    yield from texts.text_damaged(content)
    yield from texts.yaml_damaged(content)
    yield from texts.json_damaged(content, rng, amount, yaml.safe_dump)


def _text(content: bytes, _: random.Random, __: int) -> Iterator[Damage]:
    yield from texts.text_damaged(content)


def _bytes_alone(_: bytes, __: random.Random, ___: int) -> Iterator[Damage]:
    yield from ()


@dataclass(frozen=True)
class Source:
    """A file that is damaged.

    Attributes:
        kind: of the file.
        path: in the working folder.
        call: name of the call that reads it.
        damaged: damages it as its format can be.
        amount: of random damages, in the long run.
        strict: whether what cannot be read is refused; where a file is optional, or its state is reported, either is right.
        resealed: bundle whose manifest is made to list the damaged file, so that it is no hash that refuses it.
        without: file that is removed, so that this one is read.
        placed: content that is put there; empty where the file is there.
    """

    kind: FileKind
    path: str
    call: str
    damaged: Callable[[bytes, random.Random, int], Iterator[Damage]]
    amount: int = 20
    strict: bool = True
    resealed: str = ""
    without: str = ""
    placed: Path | None = None

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.path} in {self.call}" + (", resealed" if self.resealed else "")

    def prepare(self, work: Path) -> None:
        """Put the harmless file into its place, where the prepared files lack it."""
        if self.placed is not None:
            (work / self.path).write_bytes(self.placed.read_bytes())
        if self.without:
            (work / self.without).unlink()

    def damages(self, content: bytes, rng: random.Random, share: float) -> Iterator[Damage]:
        """All damages of the file's bytes; a share of the random ones."""
        amount = max(2, int(self.amount * share))
        every = chain(texts.bytes_damaged(content, rng), self.damaged(content, rng, amount))
        for name, damaged, expect in every:
            yield name, damaged, expect if self.strict else ""

    def write(self, work: Path, content: bytes) -> None:
        """Put other bytes in the place of the file; what it was linked to stays as it is."""
        path = work / self.path
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        if self.resealed:
            self._reseal(work, content)

    def replace_by_node(self, work: Path, name: str) -> bool:
        """Put something in the place of the file that is none; whether this machine lets it."""
        path = work / self.path
        path.unlink()
        (node,) = (node for node in NODES if node.name == name)
        return node.make(path.parent, path.name)

    def _reseal(self, work: Path, content: bytes) -> None:
        manifest = work / self.resealed / "manifest.json"
        listed = json.loads(manifest.read_text())
        name = os.path.relpath(work / self.path, work / self.resealed)
        listed["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.unlink()
        manifest.write_text(json.dumps(listed))


NODES = tuple(
    node
    for node in TO_READ
    if node.typed == "*" and node.name not in ("a file of another kind", "empty file", "null device")
)
"""What may lie in a file's place, nothing at all included."""

_SENTENCEPIECE = Path(__file__).parents[1] / "checkpoint" / "sentencepiece" / "tokenizer.model"

_CHAT_TEMPLATE = Path(__file__).parents[1] / "inputs" / "chat" / "templates" / "llava_next_chatml.jinja"

_REPORTS = tuple(
    Source(kinds.REPORT, path, call, _json, amount, strict=strict)
    for path, call, amount, strict in (
        ("one/unc-eval.json", "compare", 60, True),
        ("one/provenance.json", "compare", 40, False),
        ("two/unc-eval.json", "report", 40, True),
        ("one/provenance.json", "report", 40, True),
        ("one/settings.json", "eval again", 40, True),
        ("one/provenance.json", "eval again", 10, False),
        ("sweep/settings.json", "sweep finished", 20, False),
        ("sweep/sweep.json", "sweep finished", 20, False),
        ("choice/settings.json", "recommend finished", 20, False),
        ("choice/points/divprune-keep0.25.json", "recommend finished", 20, False),
        ("choice/evaluations/divprune-keep0.25/provenance.json", "recommend finished", 20, False),
        ("measured/reports/parity.json", "inspect measured", 40, False),
        ("measured/reports/text_parity.json", "inspect measured", 40, False),
        ("measured/reports/bench.json", "inspect measured", 40, False),
        ("measured/reports/recommend.json", "inspect measured", 40, False),
        ("measured/reports/parity.json", "report measured", 20, False),
        ("measured/reports/text_parity.json", "report measured", 20, False),
        ("measured/reports/bench.json", "report measured", 20, False),
        ("measured/reports/recommend.json", "report measured", 20, False),
        ("measured/reports/recommend.json", "serve", 20, True),
    )
)

SOURCES: tuple[Source, ...] = (
    Source(kinds.RECIPE, "recipe.yaml", "build", _yaml, 160),
    Source(kinds.RECIPE, "recipe.yaml", "sweep", _yaml, 20),
    Source(kinds.CONFIG, "checkpoint/config.json", "build", _json, 220),
    Source(kinds.CONFIG, "checkpoint/preprocessor_config.json", "build", _json, 80),
    Source(kinds.CONFIG, "checkpoint/generation_config.json", "build", _json, 20, strict=False),
    Source(kinds.CONFIG, "tower/config.json", "build text", _json, 60),
    Source(kinds.CONFIG, "checkpoint/config.json", "validate", _json, 40),
    Source(kinds.WEIGHT_INDEX, "sharded/model.safetensors.index.json", "build sharded", _json, 40),
    Source(kinds.WEIGHTS, "checkpoint/model.safetensors", "build", binaries.safetensors_damaged, 60),
    Source(
        kinds.WEIGHTS,
        "sharded/model-00002-of-00002.safetensors",
        "build sharded",
        binaries.safetensors_damaged,
        10,
    ),
    Source(kinds.WEIGHTS, "tower/model.safetensors", "build text", binaries.safetensors_damaged, 10),
    Source(
        kinds.WEIGHTS,
        "bundle/model.safetensors",
        "run",
        binaries.safetensors_damaged,
        10,
        strict=False,  # graphs say where in it their weights lie: its header is not read
        resealed="bundle",
    ),
    Source(kinds.TOKENIZER, "checkpoint/tokenizer.json", "build", _json, 120),
    Source(kinds.TOKENIZER, "tower/tokenizer.json", "build text", _json, 20),
    Source(
        kinds.TOKENIZER,
        "checkpoint/tokenizer.model",
        "build",
        _bytes_alone,
        strict=False,
        without="checkpoint/tokenizer.json",
        placed=_SENTENCEPIECE,
    ),
    Source(
        kinds.CHAT_TEMPLATE,
        "checkpoint/chat_template.jinja",
        "build",
        _text,
        strict=False,  # any text is a template, and a family's frame stands in for one that is missing
        placed=_CHAT_TEMPLATE,
    ),
    Source(
        kinds.CHAT_TEMPLATE,
        "spoken/chat_template.jinja",
        "build chat",
        templates.template_damaged,
        strict=False,
    ),
    Source(
        kinds.CONFIG,
        "spoken/tokenizer_config.json",
        "build chat",
        templates.tokenizer_config_damaged,
        40,
        strict=False,
        without="spoken/chat_template.jinja",
    ),
    Source(kinds.CHAT_TEMPLATE, "talking/chat_template.jinja", "ask", templates.listed_damaged),
    Source(
        kinds.CHAT_TEMPLATE,
        "talking/chat_template.jinja",
        "ask",
        templates.template_damaged,
        strict=False,
        resealed="talking",
    ),
    Source(kinds.MANIFEST, "talking/manifest.json", "ask", _json, 80),
    Source(kinds.MANIFEST, "bundle/manifest.json", "run", _json, 260),
    Source(kinds.MANIFEST, "bundle/manifest.json", "inspect", _json, 120),
    Source(kinds.MANIFEST, "bundle/manifest.json", "eval", _json, 60),
    Source(kinds.MANIFEST, "bundle/manifest.json", "calibrate", _json, 30),
    Source(kinds.MANIFEST, "bundle/manifest.json", "validate", _json, 30),
    Source(kinds.MANIFEST, "bundle/manifest.json", "bench", _json, 30),
    Source(kinds.MANIFEST, "dynamic/manifest.json", "run --keep", _json, 60),
    Source(kinds.MANIFEST, "engines/manifest.json", "inspect engines", _json, 60),
    Source(kinds.BUNDLE_TOKENIZER, "bundle/tokenizer.json", "run", _json, 80, resealed="bundle"),
    Source(kinds.BUNDLE_TOKENIZER, "bundle/tokenizer.json", "inspect", _json, 2),
    Source(kinds.GOLDEN, "proven/golden.json", "inspect proven", _json, 60, resealed="proven"),
    Source(
        kinds.GOLDEN_IMAGE, "proven/golden.png", "inspect proven", binaries.image_damaged, resealed="proven"
    ),
    Source(kinds.GOLDEN, "measured/golden.json", "serve", _json, 20, resealed="measured"),
    Source(kinds.KEYS, "keys.txt", "serve", _text, strict=False),
    Source(kinds.RECEIPT, "receipt.json", "check-receipt", _json, 60),
    Source(kinds.MESSAGES, "asked.json", "check-receipt --messages", _json, 40),
    Source(kinds.GRAPH, "bundle/decoder.onnx", "lint", graphs.graph_damaged, 160, strict=False),
    Source(kinds.GRAPH, "bundle/decoder.onnx", "lint --prove", graphs.graph_damaged, 40, strict=False),
    Source(kinds.GRAPH, "bundle/vision.onnx", "lint vision", graphs.graph_damaged, 60, strict=False),
    Source(kinds.BUNDLE_GRAPH, "bundle/decoder.onnx", "run", graphs.graph_damaged, 60, resealed="bundle"),
    Source(kinds.BUNDLE_GRAPH, "bundle/splice.onnx", "run", graphs.graph_damaged, 30, resealed="bundle"),
    Source(kinds.BUNDLE_GRAPH, "bundle/vision.onnx", "run", graphs.graph_damaged, 30, resealed="bundle"),
    Source(kinds.BUNDLE_GRAPH, "bundle/embed.onnx", "inspect", graphs.graph_damaged, 10, resealed="bundle"),
    Source(
        kinds.ENGINE,
        "engines/decoder.engine",
        "inspect engines",
        binaries.engine_damaged,
        40,
        resealed="engines",
    ),
    Source(kinds.RANGES, "ranges.json", "build fp8", _json, 30),
    Source(kinds.RANGES, "ranges.json", "calibrate --data", _json, 10),
    Source(kinds.TEXT, "calibration.txt", "build calibration", _text),
    *_REPORTS,
    Source(kinds.JOURNAL, "one/answers.jsonl", "eval again", _jsonl, 100, strict=False),
    Source(kinds.RESULTS, "one/unc-results.parquet", "compare", binaries.table_damaged, 90),
    Source(kinds.RESULTS, "two/unc-results.parquet", "report", binaries.table_damaged, 50),
    Source(kinds.ANNOTATIONS, "annotations/minigpt4.json", "eval minigpt4.json", _json, 80),
    Source(kinds.ANNOTATIONS, "annotations/shikra.jsonl", "eval shikra.jsonl", _jsonl, 60),
    Source(kinds.ANNOTATIONS, "annotations/internvl.jsonl", "eval internvl.jsonl", _jsonl, 40),
    Source(kinds.ANNOTATIONS, "annotations/mdetr.json", "eval mdetr.json", _json, 60),
    Source(kinds.ANNOTATIONS, "annotations/refer/instances.json", "eval refer", _json, 60),
    Source(kinds.ANNOTATIONS, "annotations/refer/refs(unc).p", "eval refer", binaries.pickle_damaged, 60),
    Source(kinds.ANNOTATIONS, "annotations/minigpt4.json", "calibrate --data", _json, 10),
    Source(
        kinds.ANNOTATION_TABLE,
        "annotations/parquet/val-00000-of-00001.parquet",
        "eval parquet",
        binaries.table_damaged,
        90,
    ),
    Source(kinds.PREDICTIONS, "predictions.jsonl", "eval --predictions", _jsonl, 60),
    Source(kinds.TEXT, "prose.txt", "validate --text", _text),
    Source(kinds.IMAGE, "image.png", "run", binaries.image_damaged),
    Source(kinds.IMAGE, "images/second.jpg", "eval minigpt4.json", binaries.image_damaged, strict=False),
)
