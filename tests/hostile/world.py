"""The harmless files that calls read: one folder, made once, of which every input gets a copy of what it needs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from gap_export.bundle.folder import open_bundle, write_manifest
from gap_export.bundle.hashes import record_of
from gap_export.bundle.manifest import Engine
from tests.hostile.calls import Call, call
from tests.hostile.child import Ended, run_alone
from tests.prose import prose

_EXPRESSIONS = (
    # image, expression, x1, y1, x2, y2
    ("first.jpg", "the red mug", 2, 3, 20, 24),
    ("first.jpg", "mug on the left", 2, 3, 20, 24),
    ("second.jpg", "a cat", 10, 5, 40, 36),
    ("third.jpg", "the small blue circle", 0, 0, 12, 10),
)
_SIZE = (48, 40)
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
)


@dataclass(frozen=True)
class Materials:
    """What takes long to make, from the fixtures.

    Attributes:
        checkpoint: a tiny LLaVA.
        tower: a tiny text tower.
        options: fields of its recipe.
        bundle: folder of a bundle of it.
        dynamic: of one in which requests choose how much is kept.
    """

    checkpoint: Path
    tower: Path
    options: dict[str, Any]
    bundle: Path
    dynamic: Path


class World:
    """Harmless files, made when they are first asked for.

    Args:
        folder: to make them in; absent.
        materials: to make them of.
        caches: folder for the traces of graphs.
    """

    def __init__(self, folder: Path, materials: Materials, caches: Path) -> None:
        self.folder, self.caches = folder, caches
        self._materials = materials
        self._made: set[str] = set()
        folder.mkdir(parents=True)

    def copy(self, names: tuple[str, ...], target: Path) -> None:
        """Copy entries into a folder that is there; nothing in it is linked, so that they can be damaged."""
        for name in names:
            source = self.path(name)
            if source.is_dir():
                shutil.copytree(source, target / name)
            else:
                shutil.copy(source, target / name)

    def path(self, name: str) -> Path:
        """An entry, made if it is not there yet."""
        if name not in self._made:
            self._made.add(name)
            _MAKERS[name](self, self._materials)
        return self.folder / name

    def run(self, asked: Call, made: str) -> Ended:
        """Run a harmless call and keep what it made under the same name."""
        place = self.folder.parent / f"making-{made}"
        work = place / "work"
        work.mkdir(parents=True)
        self.copy(tuple(name for name in asked.needs if name != made), work)
        ended = run_alone(asked.line, place, seconds=180, caches=self.caches)
        assert ended.code in (0, 1), (asked.name, ended.err, ended.out)
        os.rename(work / made, self.folder / made)
        shutil.rmtree(place)
        return ended


def _checkpoint(world: World, given: Materials) -> None:
    shutil.copytree(given.checkpoint, world.folder / "checkpoint")


def _tower(world: World, given: Materials) -> None:
    shutil.copytree(given.tower, world.folder / "tower")


def _spoken(world: World, given: Materials) -> None:
    """The checkpoint with a chat template, as a file of its own and in the tokenizer's configuration."""
    folder = world.folder / "spoken"
    shutil.copytree(given.checkpoint, folder)
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


def _sharded(world: World, given: Materials) -> None:
    """The checkpoint with its weights in two files and an index."""
    from safetensors.numpy import load_file, save_file

    folder = world.folder / "sharded"
    shutil.copytree(given.checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(each.nbytes for each in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _recipe(world: World, given: Materials) -> None:
    content = {**given.options, "checkpoint": "checkpoint", "text_tower": "tower"}
    (world.folder / "recipe.yaml").write_text(yaml.safe_dump(content))


def _bundle(world: World, given: Materials) -> None:
    """Its recipe names the checkpoint of the fixtures, so that references are found from any folder."""
    shutil.copytree(given.bundle, world.folder / "bundle", ignore=shutil.ignore_patterns("reports"))


def _dynamic(world: World, given: Materials) -> None:
    shutil.copytree(given.dynamic, world.folder / "dynamic", ignore=shutil.ignore_patterns("reports"))


def _measured(world: World, _: Materials) -> None:
    """A bundle with a golden request and reports of every command that leaves one, and an evaluation beside it."""
    from gap_export.pipeline.golden import add_golden

    shutil.copytree(world.path("dynamic"), world.folder / "measured")
    add_golden(world.folder / "measured")
    place = world.folder.parent / "measuring"
    (place / "work").mkdir(parents=True)
    world.copy(("measured", "annotations", "images", "checkpoint", "prose.txt"), place / "work")
    for name in ("recommend", "bench --keep", "validate --keep", "validate --text"):
        line = tuple(word.replace("dynamic", "measured") for word in call(name).line)
        ended = run_alone(line, place, seconds=180, caches=world.caches)
        assert ended.code in (0, 1), (line, ended.err)
    shutil.rmtree(world.folder / "measured")
    for name in ("measured", "measured.runs"):
        os.rename(place / "work" / name, world.folder / name)
    shutil.rmtree(place)


def _measured_runs(world: World, _: Materials) -> None:
    world.path("measured")


def _engines(world: World, _: Materials) -> None:
    """A bundle with files that begin as engines do; only a GPU could tell that they are none."""
    folder = world.folder / "engines"
    static = call("build capacity")
    world.run(replace(static, options={**static.options, "--output": "engines"}), "engines")
    bundle = open_bundle(folder)
    files, engines = dict(bundle.manifest.files), {}
    for name, graph in bundle.manifest.graphs.items():
        path = folder / f"{name}.engine"
        path.write_bytes(struct.pack("<4s12xQ4B", b"ftrt", 128, 11, 5, 0, 5) + bytes(100))
        files[path.name] = record_of(path)
        engines[name] = Engine(
            file=path.name,
            target="tensorrt",
            version="11.5.0.5",
            compute_capabilities=("8.6",),
            graph_sha256=files[graph.file].sha256,
        )
    recipe = bundle.manifest.recipe.model_copy(update={"targets": ("onnx", "tensorrt")})
    engined = {"files": files, "engines": {"tensorrt": engines}, "recipe": recipe}
    write_manifest(folder, bundle.manifest.model_copy(update=engined))


def _worded(world: World, _: Materials) -> None:
    """A bundle whose pruner reads the expression."""
    made = call("build text")
    world.run(replace(made, options={**made.options, "--output": "worded"}), "worded")


def _proven(world: World, given: Materials) -> None:
    """A bundle with a golden request."""
    from gap_export.pipeline.golden import add_golden

    folder = world.folder / "proven"
    shutil.copytree(given.bundle, folder, ignore=shutil.ignore_patterns("reports"))
    add_golden(folder)


def _receipt(world: World, _: Materials) -> None:
    """Of the bundle's answer about the image."""
    from gap_export.serving.work import Expression

    _write_receipt(world, "bundle", Expression("the red mug"), "receipt.json")


def _answered(world: World, _: Materials) -> None:
    """A receipt of an answer in the conversation that was asked."""
    from gap_export.serving.messages import read_messages

    _write_receipt(world, "talking", read_messages(world.path("asked.json")).conversation, "answered.json")


def _asked(world: World, _: Materials) -> None:
    image = {"type": "image_url", "image_url": {"url": ""}}
    content = [image, {"type": "text", "text": "what is on the table?"}]
    (world.folder / "asked.json").write_text(json.dumps([{"role": "user", "content": content}]))


def _write_receipt(world: World, bundle: str, question: Any, name: str) -> None:
    from gap_export.runtime.model import load
    from gap_export.serving.engine import Engine
    from gap_export.serving.limits import EngineLimits
    from gap_export.serving.receipts import image_digest, receipt_of
    from gap_export.serving.work import Result, Work

    image = Image.open(world.path("image.png")).convert("RGB")
    work = Work((question,), lambda: [image], 1, trace=True)
    with load(world.path(bundle), threads=1) as model:
        engine = Engine(model, EngineLimits(rows=1))
        (result,) = engine.submit(work).result()
        engine.close()
        assert isinstance(result, Result)
        receipt = receipt_of(model.bundle, work, 0, [image_digest(image)], result, None)
        receipt.write(world.folder / name)


def _keys(world: World, _: Materials) -> None:
    keys = world.folder / "keys.txt"
    keys.write_text("# of tests\n0123456789abcdef\n")
    keys.chmod(0o600)


def _prose(world: World, _: Materials) -> None:
    prose(world.folder, 300, name="prose.txt")


def _calibration(world: World, _: Materials) -> None:
    prose(world.folder, 600, name="calibration.txt")


def _image(world: World, _: Materials) -> None:
    _noise(1).save(world.folder / "image.png")


def _images(world: World, _: Materials) -> None:
    folder = world.folder / "images"
    folder.mkdir()
    for number, name in enumerate(dict.fromkeys(row[0] for row in _EXPRESSIONS)):
        _noise(number).save(folder / name)


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (_SIZE[1], _SIZE[0], 3), dtype=np.uint8)
    )


def _annotations(world: World, _: Materials) -> None:
    folder = world.folder / "annotations"
    (folder / "refer").mkdir(parents=True)
    (folder / "parquet").mkdir()
    width, height = _SIZE
    sizes = {"width": width, "height": height}
    corners = [[float(edge) for edge in row[2:]] for row in _EXPRESSIONS]
    extents = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in corners]
    images = list(dict.fromkeys(row[0] for row in _EXPRESSIONS))
    minigpt4 = [
        {"img_id": f"{row[0].removesuffix('.jpg')}_{number}", "sents": row[1], "bbox": box, **sizes}
        for number, (row, box) in enumerate(zip(_EXPRESSIONS, extents, strict=True))
    ]
    (folder / "minigpt4.json").write_text(json.dumps(minigpt4))
    for name, image, text in (("shikra", "img_path", "expression"), ("internvl", "image", "sent")):
        rows = [
            {image: row[0], text: row[1], "bbox": box, **sizes}
            for row, box in zip(_EXPRESSIONS, corners, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = [
        {"id": number, "file_name": row[0], "caption": row[1], **sizes}
        for number, row in enumerate(_EXPRESSIONS)
    ]
    boxes = [{"id": number, "image_id": number, "bbox": box} for number, box in enumerate(extents)]
    (folder / "mdetr.json").write_text(json.dumps({"images": captions, "annotations": boxes}))
    instances = {
        "images": [{"id": number, "file_name": name, **sizes} for number, name in enumerate(images)],
        "annotations": boxes,
    }
    references = [
        {
            "ref_id": number,
            "ann_id": number,
            "image_id": images.index(row[0]),
            "split": "val",
            "sentences": [{"sent_id": number, "sent": row[1]}],
        }
        for number, row in enumerate(_EXPRESSIONS)
    ]
    (folder / "refer" / "instances.json").write_text(json.dumps(instances))
    (folder / "refer" / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    _table(world, folder / "parquet" / "val-00000-of-00001.parquet", extents)


def _table(world: World, path: Path, extents: list[list[float]]) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "question_id": str(number),
            "image": {"bytes": (world.path("images") / row[0]).read_bytes(), "path": None},
            "answer": [row[1]],
            "bbox": [float(each) for each in box],
            "file_name": f"{row[0]}_{number}",
        }
        for number, (row, box) in enumerate(zip(_EXPRESSIONS, extents, strict=True))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def _predictions(world: World, _: Materials) -> None:
    names = [f"{row[0].removesuffix('.jpg')}_{number}.0" for number, row in enumerate(_EXPRESSIONS)]
    rows = [{"id": name, "answer": "[0.1, 0.2, 0.5, 0.6]"} for name in names]
    (world.folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _made_by(name: str, output: str, **changes: Any) -> Callable[[World, Materials], None]:
    """Made by a call, which is told to write there."""

    def make(world: World, _: Materials) -> None:
        asked = call(name)
        options = {**asked.options, **changes, "--output": output}
        world.run(replace(asked, options=options), output)

    return make


_MAKERS: dict[str, Callable[[World, Materials], None]] = {
    "checkpoint": _checkpoint,
    "tower": _tower,
    "sharded": _sharded,
    "spoken": _spoken,
    "recipe.yaml": _recipe,
    "bundle": _bundle,
    "dynamic": _dynamic,
    "measured": _measured,
    "measured.runs": _measured_runs,
    "engines": _engines,
    "worded": _worded,
    "proven": _proven,
    "receipt.json": _receipt,
    "answered.json": _answered,
    "asked.json": _asked,
    "keys.txt": _keys,
    "prose.txt": _prose,
    "image.png": _image,
    "images": _images,
    "annotations": _annotations,
    "predictions.jsonl": _predictions,
    "talking": _made_by("build chat", "talking"),
    "reading": _made_by("build chat text", "reading"),
    "ranges.json": _made_by("calibrate", "ranges.json"),
    "calibration.txt": _calibration,
    "one": _made_by("eval", "one"),
    "two": _made_by("eval", "two", **{"--one-by-one": True}),
    "sweep": _made_by("sweep", "sweep"),
    "choice": _made_by("recommend --pruners", "choice"),
    "report.html": _made_by("report", "report.html"),
}
