"""The public Python API: one import, light and lazy, whose names are what they say whatever was imported before."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gap_export as gap
from gap_export.bundle.folder import Bundle
from gap_export.environment import missing_package
from tests.prose import prose
from tests.test_architecture import BLOCKER, python

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"

BuildBundle = Callable[..., Bundle]
Call = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def every_module() -> None:
    """Every module of the package is imported: one with the name of a function would now stand in its place."""
    for module in pkgutil.walk_packages(gap.__path__, "gap_export."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def build(recipe: Any, tmp_path: Path) -> None:
    bundle = gap.build(recipe, tmp_path / "built")
    assert bundle.manifest.pruning.kept == 9
    with pytest.raises(gap.errors.GapExportError, match="another bundle"):
        gap.build(recipe.replaced(keep=0.5), str(tmp_path / "built"))


def load(bundle: Bundle, image: Path) -> None:
    with gap.load(bundle, threads=1) as model:
        assert isinstance(model, gap.Model)
        assert isinstance(model.ground(image, "the red mug"), gap.Answer)
        assert isinstance(model.ground(image, ["the red mug"])[0], gap.Answer)


def asked(bundle: Bundle, image: Path) -> None:
    """Free questions, in a bundle whose text is long enough for the frame of its family."""
    with gap.load(bundle, threads=1) as model:
        options = gap.AskOptions.of(max_new_tokens=2, temperature=1.0, seed=1)
        reply = model.ask("the red mug ?", image, options=options)
        assert isinstance(reply, gap.Reply)
        assert isinstance(model.stream("the red mug ?", image), gap.ReplyStream)
        chat = model.chat(image)
        assert isinstance(chat, gap.Chat)
        assert chat.ask("the red mug ?", options=options).text == reply.text
        with chat.stream("a cat ?", max_new_tokens=2) as stream:
            assert "".join(stream) == stream.reply.text
        assert len(chat.turns) == 4
        refused(lambda: model.ask("", image))
        refused(lambda: chat.ask("the red mug ?", temperature=-1))


def placed() -> None:
    placement = gap.positions.place(
        np.array([[3, 7]]),
        text_before=np.array([2]),
        text_after=np.array([1]),
        visual_tokens=9,
        policy=gap.positions.PositionPolicy.GAP,
    )
    assert placement.position_ids.tolist() == [[0, 1, 5, 9, 11]]


def compared(bundle: Bundle, scenes: Any, tmp_path: Path) -> None:
    run = gap.evaluate(bundle, scenes, limit=4, threads=1)
    assert gap.compare(run, run).passed
    assert gap.compare(run.folder, str(run.folder)).expressions == 4
    written = gap.report([run.folder, run.folder], tmp_path / "page.html", pruners=False)
    assert (tmp_path / "page.html").stat().st_size == written.bytes


def predicted(scenes: Any, tmp_path: Path) -> None:
    lines = (json.dumps({"id": each.id, "answer": "nothing"}) for each in scenes.expressions[:3])
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    record = gap.evaluate_predictions(tmp_path / "answers.jsonl", scenes, "llava", limit=3)
    assert (record.expressions, record.accuracy) == (3, 0.0)


def receipted(bundle: Bundle) -> None:
    from gap_export.serving.work import Expression
    from tests.serving.test_receipts import answered

    (answer,) = answered(bundle, Expression("the red mug"))
    assert gap.check_receipt(bundle, answer.receipt, answer.image).agrees


def served(bundle: Bundle) -> None:
    """Until it was ready."""
    from gap_export.serving.server import Server, ServerOptions

    proven = gap.add_golden(shutil.copytree(bundle.folder, bundle.folder.with_name("proven")))
    told: list[str] = []
    servers: list[Server] = []

    def tell(line: str) -> None:
        told.append(line)
        if line == "ready":
            servers[0].stop()

    gap.serve(proven, options=ServerOptions(port=0), threads=1, on_listening=servers.append, tell=tell)
    assert told[-1] == "ready"
    assert servers[0].address.startswith("http://127.0.0.1:")


def chosen(tiny_bundle: BuildBundle, tmp_path: Path) -> Path:
    """Folder of a bundle in which requests choose how many tokens are kept."""
    return Path(shutil.copytree(tiny_bundle(keep="0.1:0.25:1.0").folder, tmp_path / "chosen"))


def refused(call: Call) -> None:
    with pytest.raises(gap.errors.GapExportError) as caught:
        call()
    assert caught.value.hint


@pytest.fixture(scope="module")
def scenes() -> Any:
    """Two expressions for every scene."""
    return gap.open_dataset("scenes:2")


@pytest.mark.slow
@pytest.mark.parametrize("name", gap.__all__)
def test_every_public_name_does_what_it_says(
    name: str,
    tiny_bundle: BuildBundle,
    tiny_options: dict[str, Any],
    scenes: Any,
    image_file: Path,
    tmp_path: Path,
) -> None:
    nowhere = tmp_path / "nowhere"
    bundle = gap.open_bundle(shutil.copytree(tiny_bundle().folder, tmp_path / "bundle"))
    recipe = gap.Recipe.model_validate({**tiny_options, "keep": 0.25})
    calls: dict[str, tuple[Call, ...]] = {
        "Answer": (lambda: load(bundle, image_file),),
        "AskOptions": (
            lambda: gap.AskOptions.of(temperature=0.5, stop="x").sampling,
            lambda: refused(lambda: gap.AskOptions.of(top_p=2)),
        ),
        "Chat": (lambda: asked(tiny_bundle(max_text=120), image_file),),
        "Reply": (lambda: asked(tiny_bundle(max_text=120), image_file),),
        "ReplyStream": (lambda: asked(tiny_bundle(max_text=120), image_file),),
        "add_golden": (
            lambda: gap.add_golden(bundle.folder).golden,
            lambda: refused(lambda: gap.add_golden(nowhere)),
        ),
        "Bundle": (lambda: gap.Bundle(bundle.folder, bundle.manifest).graph_path("vision").stat(),),
        "Model": (lambda: load(bundle, image_file),),
        "Recipe": (
            lambda: gap.Recipe.load("shapes", keep=0.5, pruner="divprune").checkpoint,
            lambda: refused(lambda: gap.Recipe.load("no recipe")),
            lambda: refused(lambda: gap.Recipe.load("shapes", keep=2)),
        ),
        "__version__": (lambda: gap.__version__.split("."),),
        "bench": (
            lambda: gap.bench([bundle], requests=1, new_tokens=1, memory=False, threads=1),
            lambda: refused(lambda: gap.bench([nowhere])),
        ),
        "build": (lambda: build(recipe, tmp_path),),
        "calibrate": (
            lambda: gap.calibrate(bundle, limit=1, threads=1),
            lambda: refused(lambda: gap.calibrate(nowhere)),
        ),
        "check_receipt": (
            lambda: receipted(bundle),
            lambda: refused(lambda: gap.check_receipt(bundle, nowhere, image_file)),
            lambda: refused(lambda: gap.check_receipt(nowhere, {}, image_file)),
        ),
        "compare": (
            lambda: compared(bundle, scenes, tmp_path),
            lambda: refused(lambda: gap.compare(nowhere, nowhere)),
        ),
        "errors": (lambda: refused(lambda: gap.load(nowhere)),),
        "evaluate": (
            lambda: gap.evaluate(bundle, scenes, limit=4, threads=1),
            lambda: refused(lambda: gap.evaluate(bundle, scenes, protocol="mine")),
        ),
        "evaluate_predictions": (
            lambda: predicted(scenes, tmp_path),
            lambda: refused(lambda: gap.evaluate_predictions(nowhere, scenes, "nobody")),
        ),
        "fastest_backend": (
            lambda: gap.load(bundle, backend=gap.fastest_backend(bundle).backend, threads=1).close(),
            lambda: refused(lambda: gap.fastest_backend(nowhere)),
        ),
        "inspect": (
            lambda: json.dumps(gap.inspect(bundle)),
            lambda: refused(lambda: gap.inspect(nowhere)),
        ),
        "lint": (
            lambda: gap.lint(bundle.graph_path("decoder")).raise_for_errors(),
            lambda: refused(lambda: gap.lint(nowhere)),
            lambda: refused(lambda: gap.lint(bundle.graph_path("decoder"), kind="encoder")),  # type: ignore[arg-type]
        ),
        "load": (
            lambda: load(bundle, image_file),
            lambda: refused(lambda: gap.load(bundle, backend="tflite")),
        ),
        "models": (lambda: json.dumps(gap.models()),),
        "open_bundle": (
            lambda: gap.open_bundle(str(bundle.folder)).manifest,
            lambda: refused(lambda: gap.open_bundle(nowhere)),
        ),
        "open_dataset": (
            lambda: gap.open_dataset("scenes").expressions[0],
            lambda: refused(lambda: gap.open_dataset("nowhere")),
        ),
        "positions": (placed,),
        "recommend": (
            lambda: gap.recommend(
                chosen(tiny_bundle, tmp_path), scenes, keeps=(1.0, 0.25), limit=4, requests=1
            ),
            lambda: refused(lambda: gap.recommend(bundle, scenes, keeps=[0.5])),
        ),
        "recommend_pruner": (
            lambda: refused(
                lambda: gap.recommend_pruner(recipe, tmp_path / "out", scenes, pruners=["dart"], keeps=[1.0])
            ),
            lambda: refused(lambda: gap.recommend_pruner(recipe, tmp_path / "out", scenes, pruners=["none"])),
            lambda: refused(
                lambda: gap.recommend_pruner(recipe, tmp_path / "out", scenes, max_accuracy_drop=2.0)
            ),
        ),
        "report": (
            lambda: compared(bundle, scenes, tmp_path),
            lambda: refused(lambda: gap.report(nowhere)),
        ),
        "serve": (
            lambda: served(bundle),
            lambda: refused(lambda: gap.serve(bundle)),  # it has no golden request
            lambda: refused(lambda: gap.serve(nowhere)),
        ),
        "sweep": (lambda: refused(lambda: gap.sweep(recipe, tmp_path / "out", keeps=[3.0])),),
        "validate": (
            lambda: refused(lambda: gap.validate(nowhere)),
            lambda: refused(lambda: gap.validate(bundle, backend="torch")),
        ),
        "validate_text": (
            lambda: gap.validate_text(bundle, prose(tmp_path), tokens=8, threads=1).raise_for_gates(),
            lambda: refused(lambda: gap.validate_text(bundle, nowhere)),
            lambda: refused(lambda: gap.validate_text(nowhere, prose(tmp_path))),
        ),
    }
    assert set(calls) == set(gap.__all__) == set(dir(gap))
    for call in calls[name]:
        call()


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        gap.biuld  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_is_instant_and_imports_nothing() -> None:
    code = """
import sys, time
began = time.perf_counter()
import gap_export
spent = time.perf_counter() - began
heavy = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "PIL", "pydantic", "typer"} & set(sys.modules)
assert not heavy, heavy
print(spent)
"""
    spent = []
    for _ in range(5):
        done = python(code)
        assert done.returncode == 0, done.stderr
        spent.append(float(done.stdout))
    assert min(spent) < 0.1


def test_what_takes_the_build_extra_says_so(tiny_bundle: BuildBundle) -> None:
    code = f"""{BLOCKER}
import sys
import gap_export as gap
calls = [
    lambda: gap.build(gap.Recipe.load("shapes"), "x"),
    lambda: gap.validate(sys.argv[1]),
    lambda: gap.lint("x.onnx"),
    lambda: gap.calibrate(sys.argv[1]),
    lambda: gap.sweep(gap.Recipe.load("shapes"), "x"),
    lambda: gap.recommend_pruner(gap.Recipe.load("shapes"), "x"),
]
for call in calls:
    try:
        call()
    except gap.errors.MissingRequirementError as error:
        assert "gap-export[build]" in error.hint, error
    else:
        raise AssertionError
"""
    done = python(code, str(tiny_bundle().folder))
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_imported_is_told_apart_from_what_is_not_installed() -> None:
    there = missing_package(ImportError("libcudart.so.13: cannot open", name="torch"), "x")
    assert "cannot be imported: libcudart.so.13" in there.message
    assert "not installed" in missing_package(ModuleNotFoundError("No module", name="torch.fx"), "x").message
    with pytest.raises(ImportError, match="cannot import name"):
        missing_package(ImportError("cannot import name 'x'", name="gap_export.errors"), "x")


# ----------------------------------------------------------------------------------------------------------------------
# The page


def blocks(heading: str = "") -> str:
    """The examples below a heading (all of them: every heading), in their order, as one program."""
    page = PAGE.read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    wanted = [section for section in sections if section.startswith(heading)]
    assert wanted, heading
    return "\n".join(
        found for each in wanted for found in re.findall(r"^```python\n(.*?)^```$", each, re.M | re.S)
    )


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's examples run, in order, as one program: it holds an image, and afterwards the bundle."""
    folder = tmp_path_factory.mktemp("api")
    shutil.copy(ROOT / "docs" / "images" / "scene.png", folder)
    done = subprocess.run(
        [sys.executable, "-c", blocks()], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_examples_of_the_page_run(working_folder: Path) -> None:
    assert (working_folder / "answer.png").is_file()


def test_the_examples_that_run_a_bundle_need_the_base_install_alone(working_folder: Path) -> None:
    (working_folder / "answer.png").unlink()
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER + blocks("Run a bundle")],
        cwd=working_folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (working_folder / "answer.png").is_file()


def test_the_page_names_everything() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [name for name in gap.__all__ if f"`gap.{name}" not in page and name != "__version__"]
    assert not missing
