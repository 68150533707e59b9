"""Layering: who imports whom, and what must not be imported at run time."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gap_export
from gap_export.bundle.folder import Bundle

PACKAGE = Path(gap_export.__file__).parent

LAYERS = (
    "errors",
    "environment",
    "terminal",
    "bounds",
    "files",
    "records",
    "progress",
    "positions",
    "precision",
    "inputs",
    "boxes",
    "recipe",
    "bundle",
    "checkpoint",
    "prune",
    "plan",
    "modeling",
    "families",
    "graph",
    "linter",
    "engine",
    "runtime",
    "pipeline",
    "parallel",
    "evaluation",
    "serving",
    "cli",
    "__main__",
)
"""In the order of the flow: a module imports from its own layer and from those above it."""

HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
    "ml_dtypes",
    "matplotlib",
}
"""What running a bundle does not need."""

RUN_TIME_LAYERS = (
    "errors",
    "environment",
    "terminal",
    "bounds",
    "files",
    "records",
    "progress",
    "positions",
    "precision",
    "inputs",
    "recipe",
    "bundle",
    "boxes",
    "runtime",
)
BUILD_ONLY = ("runtime.torch",)


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name within the package -> file, of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, path


MODULES = dict(modules())


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module as (dotted name, whether at the top of the file); annotations' own imports left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in for_annotations:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("gap_export.") in MODULES
                yield (inner if is_module else str(node.module)), id(node) in top


def layer_of(module: str) -> str:
    """The layer of a module."""
    fitting = [layer for layer in LAYERS if module == layer or module.startswith(f"{layer}.")]
    assert fitting, f"{module} has no place among the layers"
    return max(fitting, key=len)


IMPORTS = {
    module: {
        name.removeprefix("gap_export.")
        for name, _ in imports_of(path)
        if name.startswith("gap_export.")
        and name.removeprefix("gap_export.") != module
        and not name.removeprefix("gap_export.").startswith("_")
    }
    for module, path in MODULES.items()
}
"""Module -> modules of this package that it imports."""


def test_no_import_points_upward() -> None:
    upward = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in sorted(names)
        if LAYERS.index(layer_of(name)) > LAYERS.index(layer_of(module))
    ]
    assert not upward


def test_no_imports_form_a_circle() -> None:
    """Imports inside functions count too; a package stands for the names in its `__init__`."""
    try:
        tuple(graphlib.TopologicalSorter(IMPORTS).static_order())
    except graphlib.CycleError as circle:
        pytest.fail(f"imports form a circle: {' -> '.join(circle.args[1])}")


def test_every_layer_is_there() -> None:
    there = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - {"__init__"} == set(LAYERS)
    assert len(list(PACKAGE.glob("[!_.]*"))) <= 28


def test_run_time_modules_name_no_heavy_package() -> None:
    heavy = {
        name: found
        for name, path in MODULES.items()
        if name.partition(".")[0] in RUN_TIME_LAYERS and not name.startswith(BUILD_ONLY)
        if (found := [used for used, _ in imports_of(path) if used.partition(".")[0] in HEAVY])
    }
    assert not heavy


def test_the_command_line_imports_nothing_heavy_at_the_top() -> None:
    light = {
        "__future__",
        "json",
        "signal",
        "sys",
        "warnings",
        "collections",
        "contextlib",
        "pathlib",
        "typing",
        "typer",
        "rich",
        "gap_export",
        "os",
        "errno",
    }
    tops = {name.partition(".")[0] for name, top in imports_of(MODULES["cli"]) if top}
    assert tops <= light


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_a_bundle_runs_without_torch_transformers_and_onnx(
    tiny_bundle: Callable[..., Bundle], image_file: Path
) -> None:
    folder = str(tiny_bundle().folder)
    code = f"""{BLOCKER}
import gap_export.bundle.manifest, gap_export.runtime.ort, gap_export.runtime.grounder
import gap_export.boxes.codecs, gap_export.boxes.draw, gap_export.boxes.metrics, gap_export.boxes.scenes
from gap_export import cli
cli.main()
"""
    done = python(code, "run", folder, "--image", str(image_file), "--refer", "the red mug", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["kept_indices"]) == 9
    inspected = python(code, "inspect", folder, "--json")
    assert inspected.returncode == 0, inspected.stderr


def test_templates_are_compiled_in_a_process_of_their_own(
    tiny_bundle: Callable[..., Bundle], image_file: Path
) -> None:
    """A free question is asked without what a build needs, and what compiles its template is never imported beside the model."""
    code = f"""{BLOCKER}
import gap_export as gap
with gap.load(sys.argv[1], threads=1) as model:
    assert "jinja2" not in sys.modules
    assert model.ask("the red mug ?", sys.argv[2], max_new_tokens=2).new_tokens == 2
found = {{"jinja2", "markupsafe"}} & set(sys.modules)
assert not found, found
"""
    done = python(code, str(tiny_bundle(max_text=120).folder), str(image_file))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "--model", "shapes", "-o", "x"),
        ("validate", "x"),
        ("lint", "x.onnx"),
        ("sweep", "--model", "shapes"),
        ("recommend", "--pruners", "all", "--model", "shapes", "-o", "x"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_the_build_extra_say_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code = f"{BLOCKER}\nimport os; os.chdir({str(tmp_path)!r})\nfrom gap_export import cli\ncli.main()"
    done = python(code, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "gap-export[build]" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from gap_export import cli
try:
    cli.main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "PIL", "tokenizers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    for arguments in (["--help"], ["build", "--help"], ["sweep", "--help"], ["--version"]):
        done = python(code, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_models_command_needs_no_build_extra() -> None:
    done = python(f"{BLOCKER}\nfrom gap_export import cli\ncli.main()", "models", "--json")
    assert done.returncode == 0, done.stderr
    assert {recipe["name"] for recipe in json.loads(done.stdout)["recipes"]} >= {"shapes", "llava"}
