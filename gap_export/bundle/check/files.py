"""The files of a bundle: plain names below its folder, every one that is used among those that are hashed."""

from __future__ import annotations

import re
from collections import Counter

from gap_export.bundle.check.limits import Faults
from gap_export.bundle.manifest import Manifest
from gap_export.errors import shown

LONGEST_NAME = 255
"""Characters of a name in a path."""

CHAT_TEMPLATE = "chat_template.jinja"
GOLDEN, GOLDEN_IMAGE = "golden.json", "golden.png"
_TOKENIZER, _TEXT_TOKENIZER = "tokenizer.json", "text_tokenizer.json"
_PART = re.compile(r"[^\\/:\x00-\x1f\x7f]+")


def file_faults(manifest: Manifest) -> Faults:
    """What is wrong with the names of files."""
    files = manifest.files
    for name, record in files.items():
        if not is_plain(name):
            yield f"files: {shown(name)} is no plain name of a file in the folder"
        if not 0 <= record.bytes < 2**50:
            yield f"files.{name}.bytes is {shown(record.bytes)}"
        if re.fullmatch("[0-9a-f]{64}", record.sha256) is None:
            yield f"files.{name}.sha256 is no hash"
    if (GOLDEN in files) != (GOLDEN_IMAGE in files):
        one, other = (GOLDEN, GOLDEN_IMAGE) if GOLDEN in files else (GOLDEN_IMAGE, GOLDEN)
        yield f"files: {one} is listed without {other}"
    tower = manifest.text_tower
    used = [_TOKENIZER, *([_TEXT_TOKENIZER] if tower is not None and tower.kind == "clip" else ())]
    graphs = {f"graphs.{name}": graph.file for name, graph in manifest.graphs.items()}
    engines = {
        f"engines.{target}.{name}": engine.file
        for target, of_target in manifest.engines.items()
        for name, engine in of_target.items()
    }
    for field, name in [*graphs.items(), *engines.items(), *(("files", name) for name in used)]:
        if name not in files:
            yield f"{field}: {shown(name)} is not among the files that are hashed"
    counted = Counter([*graphs.values(), *engines.values()])
    name, count = counted.most_common(1)[0] if counted else ("", 0)
    if count > 1:
        yield f"{shown(name)} is the file of several graphs"
    for target, of_target in manifest.engines.items():
        if of_target.keys() != manifest.graphs.keys():
            yield f"engines.{target} has {shown(sorted(of_target))}, and the graphs are {shown(sorted(manifest.graphs))}"
        for name, engine in of_target.items():
            if engine.target != target:
                yield f"engines.{target}.{name}.target is {engine.target}"


def is_plain(name: str) -> bool:
    """Whether a name is a path below the folder, in the alphabet of all systems."""
    parts = name.split("/")
    return (
        all(
            _PART.fullmatch(part)
            and part.strip(" ") == part
            and part not in (".", "..")
            and len(part) <= LONGEST_NAME
            for part in parts
        )
        and len(name) <= 4 * LONGEST_NAME
    )
