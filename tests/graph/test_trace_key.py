"""What a traced graph is found again by: everything that it depends on, and nothing else."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import gap_export
from gap_export import families
from gap_export.checkpoint import open_checkpoint
from gap_export.families import table
from gap_export.graph import trace_key
from gap_export.graph.trace_key import key_of
from gap_export.modeling.components import Component
from gap_export.modeling.fake import fake_mode
from gap_export.pipeline.opened import open_model
from gap_export.plan import plan_for
from gap_export.positions import PositionPolicy
from gap_export.prune.table import PRUNERS
from gap_export.recipe.recipe import Recipe

Lookup = Callable[..., Component]
FILES = ("config.json", "tokenizer.json")


@dataclass(frozen=True)
class Chosen:
    policy: PositionPolicy
    kept: tuple[int, ...]


def components(options: dict[str, Any], folder: Path) -> dict[str, Component]:
    recipe = Recipe.model_validate({**options, "checkpoint": str(folder)})
    model = open_model(recipe)
    made = model.components(plan_for(recipe, model.spec, model.text_tower))
    return {component.spec.name: component for component in made}


def long_ago(file: Path) -> None:
    os.utime(file, (0, 0))


# The component


def test_plain_values_are_told_apart(lookup: Lookup) -> None:
    settings = [
        "a",
        ("a",),
        0.5,
        Chosen(PositionPolicy.GAP, (1,)),
        Chosen(PositionPolicy.GAP, (1, 2)),
        Chosen(PositionPolicy.SHIFTED, (1,)),
    ]
    keys = [key_of(lookup(each)) for each in settings]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert keys == [key_of(lookup(each)) for each in settings], "of their value, not of what they are made of"


def test_what_says_nothing_has_no_key(lookup: Lookup) -> None:
    assert key_of(lookup()) is None
    assert key_of(lookup((object(),))) is None


def test_a_spec_is_part_of_it(lookup: Lookup) -> None:
    component = lookup("a")
    other = component.spec.model_copy(update={"name": "splice"})
    assert key_of(component) != key_of(replace(component, spec=other))


# The checkpoint


def test_a_checkpoint_counts_by_its_content(tiny_options: dict[str, Any], checkpoint_copy: Path) -> None:
    """Neither where it lies nor what its weights are."""
    here = components(tiny_options, Path(tiny_options["checkpoint"]))
    weights = checkpoint_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    there = components(tiny_options, checkpoint_copy)
    assert {name: key_of(part) for name, part in here.items()} == {
        name: key_of(part) for name, part in there.items()
    }
    assert len({key_of(part) for part in here.values()}) == 4


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_every_file_of_settings_counts(
    file: str, tiny_options: dict[str, Any], checkpoint_copy: Path
) -> None:
    """For tower and decoder: of a checkpoint, the graphs of tokens have the table and the placeholder's id, nothing else."""
    before = components(tiny_options, checkpoint_copy)
    path = checkpoint_copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": 1}))
    after = components(tiny_options, checkpoint_copy)
    assert {name for name in before if key_of(before[name]) != key_of(after[name])} == {"vision", "decoder"}


def test_the_table_and_the_placeholder_count(tiny_options: dict[str, Any], checkpoint_copy: Path) -> None:
    before = components(tiny_options, checkpoint_copy)
    config, tokenizer = (json.loads((checkpoint_copy / name).read_text()) for name in FILES)
    config["image_token_index"] += 1
    (image,) = (token for token in tokenizer["added_tokens"] if token["content"] == "<image>")
    (word,) = (word for word, number in tokenizer["model"]["vocab"].items() if number == image["id"] + 1)
    tokenizer["model"]["vocab"].update({word: image["id"], "<image>": image["id"] + 1})
    image["id"] += 1
    for name, content in zip(FILES, (config, tokenizer), strict=True):
        (checkpoint_copy / name).write_text(json.dumps(content))
    other_id = components(tiny_options, checkpoint_copy)
    assert key_of(before["splice"]) != key_of(other_id["splice"])
    assert key_of(before["embed"]) == key_of(other_id["embed"])
    in_half = components({**tiny_options, "precision": "fp16"}, checkpoint_copy)
    assert all(key_of(in_half[name]) != key_of(other_id[name]) for name in before)


def test_how_much_there_is_room_for_does_not_count(tiny_options: dict[str, Any]) -> None:
    """Capacity and longest prompt: graphs have their names in them, not their values. How many tokens there are to keep counts."""
    folder = Path(tiny_options["checkpoint"])

    def keys(**changes: Any) -> dict[str, str | None]:
        return {name: key_of(part) for name, part in components({**tiny_options, **changes}, folder).items()}

    usual = keys(keep="0.2:0.3:1.0")
    assert keys(keep="0.2:0.3:1.0", max_text=40, max_new_tokens=9) == usual
    fewer = keys(keep="0.2:0.3:0.9")
    assert {name for name in usual if usual[name] != fewer[name]} == {"vision", "splice"}
    assert keys(keep="0.2:0.3:1.0", capacity=80)["decoder"] != usual["decoder"], (
        "a cache that is static counts"
    )


def test_headers_and_companions_of_a_checkpoint_count(tiny_checkpoint: Path, tiny_text_tower: Path) -> None:
    checkpoint, companion = open_checkpoint(tiny_checkpoint), open_checkpoint(tiny_text_tower)
    name, location = next(iter(checkpoint.weights.items()))
    variants = [
        checkpoint,
        checkpoint.with_weights({name: replace(location, dtype="F16")}),
        checkpoint.with_weights({name: replace(location, shape=(1, *location.shape))}),
        checkpoint.with_weights({f"{name}.another": location}),
        checkpoint.with_companion("text_tower", companion),
        checkpoint.with_companion("vision_tower", companion),
    ]
    prints = [variant.fingerprint() for variant in variants]
    assert len(set(prints)) == len(prints)
    joined = checkpoint.with_companion("text_tower", companion)
    assert joined.fingerprint(without=("text_tower",)) == checkpoint.fingerprint()


def test_only_the_vision_graph_depends_on_a_text_tower(
    tiny_options: dict[str, Any], tiny_checkpoint: Path, tiny_text_tower: Path, tmp_path: Path
) -> None:
    def keys(pruner: str, text_tower: Path) -> dict[str, str | None]:
        parts = components({**tiny_options, "pruner": pruner, "text_tower": str(text_tower)}, tiny_checkpoint)
        return {name: key_of(part) for name, part in parts.items()}

    reads, other = keys("cdpruner", tiny_text_tower), keys("divprune", tiny_text_tower)
    assert {name for name in reads if reads[name] != other[name]} == {"vision"}
    moved = Path(shutil.copytree(tiny_text_tower, tmp_path / "moved"))
    assert keys("cdpruner", moved) == reads


# The code


def test_versions_and_the_processor_count(lookup: Lookup, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key_of(lookup("a"))}
    for changed in ({"versions": {}}, {"processor": ()}):
        other = {**trace_key._surroundings(), **changed}
        monkeypatch.setattr(trace_key, "_surroundings", lambda other=other: other)
        keys.add(key_of(lookup("a")))
        monkeypatch.undo()
    assert len(keys) == 3
    assert set(trace_key._surroundings()["versions"]) == {  # type: ignore[call-overload]
        "python", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy"}  # fmt: skip


def test_every_source_of_the_package_is_hashed_once(lookup: Lookup, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps, _ = trace_key._package_as_loaded()
    root = Path(gap_export.__file__).parent
    assert {path.relative_to(root).as_posix() for path in stamps} >= {
        "__init__.py",
        "families/llava.py",
        "prune/divprune.py",
        "graph/trace.py",
    }
    monkeypatch.setattr(trace_key, "_digest", lambda *_: pytest.fail("hashed again"))
    assert key_of(lookup("a")) is not None


def test_sources_that_change_while_this_process_runs(
    lookup: Lookup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs may be the text before or after: nothing is kept, and nothing taken."""
    source = tmp_path / "room" / "module.py"
    source.parent.mkdir()
    source.write_text("one = 1")
    long_ago(source)
    monkeypatch.setattr(trace_key, "_PACKAGE", tmp_path)
    trace_key._package_as_loaded.cache_clear()
    try:
        assert key_of(lookup("a")) is not None
        source.write_text("one = 2")
        assert key_of(lookup("a")) is None
        long_ago(source)  # seen by its size alone
        source.write_text("one = 11")
        long_ago(source)
        assert key_of(lookup("a")) is None
        (source.parent / "another.py").write_text("")
        assert key_of(lookup("a")) is None
    finally:
        trace_key._package_as_loaded.cache_clear()


@pytest.mark.parametrize("in_a_package", [True, False])
def test_modules_from_outside_count_with_what_lies_beside_them(
    in_a_package: bool, lookup: Lookup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "toy_package" if in_a_package else tmp_path
    folder.mkdir(exist_ok=True)
    name, beside = "toy_package.toy_layers" if in_a_package else "toy_layers", folder / "toy_parts.py"
    if in_a_package:
        (folder / "__init__.py").write_text("")
    (folder / "toy_layers.py").write_text("from torch import nn\n\nclass Toy(nn.Linear):\n    pass\n")
    beside.write_text("")
    for file in folder.iterdir():
        long_ago(file)
    monkeypatch.syspath_prepend(str(tmp_path))
    with fake_mode():
        toy = importlib.import_module(name).Toy(2, 2)
    component = lookup("a")
    component.module.inner = nn.ModuleList([toy])

    keys = [key_of(lookup("a")), key_of(component)]
    beside.write_text("changed = True")
    keys.append(key_of(component))
    long_ago(beside)
    keys.append(key_of(component))
    assert keys[2] is None
    assert len(set(keys)) == 4


def test_classes_without_a_source_have_no_key(lookup: Lookup) -> None:
    component = lookup("a")
    scope: dict[str, Any] = {"__name__": "nowhere", "nn": nn}
    exec("class Nowhere(nn.Module): pass", scope)
    component.module.inner = scope["Nowhere"]()
    assert key_of(component) is None


def a_family(module: str) -> tuple[dict[str, Any], Any]:
    return table._ROWS, replace(families.row("llava"), name="toy", implementation=f"{module}:Toy")


def a_pruner(module: str) -> tuple[dict[str, Any], Any]:
    return PRUNERS, replace(PRUNERS["spatial"], name="toy", module=module)


@pytest.mark.parametrize("row", [a_family, a_pruner])
def test_rows_from_outside_count(
    row: Callable[[str], tuple[dict[str, Any], Any]],
    lookup: Lookup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / f"toy_{row.__name__}.py"
    source.write_text("")
    long_ago(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = [key_of(lookup("a"))]
    rows, added = row(source.stem)
    monkeypatch.setitem(rows, "toy", added)
    keys.append(key_of(lookup("a")))
    source.write_text("# another")
    long_ago(source)
    keys.append(key_of(lookup("a")))
    assert None not in keys
    assert len(set(keys)) == 3


CHANGED_FAMILY = """
import importlib
import os
import sys
from pathlib import Path

recipe, package, traces = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def traced():
    for name in [name for name in sys.modules if name.partition(".")[0] == "gap_export"]:
        del sys.modules[name]  # a new process would have imported nothing yet
    importlib.invalidate_caches()
    from gap_export.graph.trace_cache import Tracer
    from gap_export.graph.trace_folder import TraceFolder
    from gap_export.pipeline.opened import open_model
    from gap_export.plan import plan_for
    from gap_export.recipe.recipe import Recipe

    assert Path(sys.modules["gap_export"].__file__).parent == package
    asked = Recipe.model_validate_json(recipe)
    model = open_model(asked)
    parts = model.components(plan_for(asked, model.spec))
    made = Tracer(TraceFolder(traces))(next(part for part in parts if part.spec.name == "embed"))
    print(made.cached, *[node.op_type for node in made.model.graph])


traced()
traced()
source = package / "families" / "llava.py"
splice = "__import__('gap_export.modeling.splice').modeling.splice"
line = f"{splice}.Embed.forward = lambda self, input_ids: -self.embed_tokens(input_ids)"
before = source.read_text()
for text in (f"{before}\\n{line}\\n", before):
    source.write_text(text)
    os.utime(source, (0, len(text)))
    traced()
"""


def test_a_changed_line_of_a_family_is_a_new_trace(tiny_options: dict[str, Any], tmp_path: Path) -> None:
    package = shutil.copytree(
        Path(gap_export.__file__).parent,
        tmp_path / "copy" / "gap_export",
        ignore=shutil.ignore_patterns("__pycache__", "assets"),
    )
    recipe = Recipe.model_validate(tiny_options).model_dump_json()
    printed = subprocess.check_output(
        [sys.executable, "-c", CHANGED_FAMILY, recipe, str(package), str(tmp_path / "traces")],
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        cwd=tmp_path,
        text=True,
    )
    assert printed.splitlines() == ["False Gather", "True Gather", "False Gather Neg", "True Gather"]
