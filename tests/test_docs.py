"""The documents do not drift: their commands parse, their links lead somewhere, the generated page is current."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from gap_export.bundle.folder import Bundle
from gap_export.cli import app
from gap_export.inputs.images import load_image
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Grounder

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "bench/*.md",
        "training/**/*.md",
        "gap_export/checkpoint/assets/**/*.md",
    )
    for path in ROOT.glob(pattern)
)
GENERATED = ROOT / "docs" / "commands.md"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        if document != GENERATED:
            for line in document.read_text(encoding="utf-8").splitlines():
                if line.startswith("    gap-export "):
                    found.append((document.name, line.strip()))
    return found


def test_the_readme_shows_the_main_commands() -> None:
    shown = {shlex.split(line)[1] for name, line in commands() if name == "README.md"}
    assert {"build", "validate", "run"} <= shown


def test_documented_commands_parse() -> None:
    """Every option exists and every value has the right type; nothing is run."""
    group = typer.main.get_command(app)
    wrong = []
    for document, line in commands():
        name, *arguments = shlex.split(line)[1:]
        context = group.make_context("gap-export", [name, "--help"], resilient_parsing=True)
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        try:
            assert command is not None, "no such command"
            command.make_context(name, arguments)
        except Exception as error:  # click's own errors are of many kinds
            wrong.append(f"{document}: {line}: {error}")
    assert commands()
    assert not wrong


def test_a_wrong_command_would_be_noticed() -> None:
    group = typer.main.get_command(app)
    build = group.get_command(
        group.make_context("gap-export", ["build", "--help"], resilient_parsing=True), "build"
    )  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="--kepe"):
        build.make_context("build", ["--model", "shapes", "-o", "x", "--kepe", "0.25"])


@pytest.mark.slow
def test_the_page_about_asking_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of the bundled model, command by command, and its program; what a large one would be asked is only parsed."""
    shutil.copy(ROOT / "docs" / "images" / "scene.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "asking.md").read_text(encoding="utf-8")
    lines = [line for name, line in commands() if name == "asking.md" and "out/llava" not in line]
    assert len(lines) > 10
    questions = "where is the yellow circle?\n/new\nwhere is the small orange triangle?\n"
    said = {line: CliRunner().invoke(app, shlex.split(line)[1:], input=questions) for line in lines}
    assert not {line: done.output for line, done in said.items() if done.exit_code}
    built = said[lines[0]].output
    shown = [line for line in page.splitlines() if line.startswith("    ") and f"  {line.strip()}" in built]
    assert len(shown) == 3, built
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "('user', 'where is the small orange triangle?')" in done.stdout


def test_links_lead_somewhere() -> None:
    broken = [
        f"{document.relative_to(ROOT)} links to {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
        if not target.startswith(("http://", "https://")) and not (document.parent / target).exists()
    ]
    assert not broken


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        (document.name, first or second)
        for document in DOCUMENTS
        for first, second in re.findall(
            r"^    make ([a-z-]+)$|`make ([a-z-]+)`", document.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert named
    assert not [each for each in named if not re.search(rf"^{each[1]}:", makefile, re.MULTILINE)]


@pytest.mark.parametrize("name", GENERATOR.PARTS)
def test_generated_parts_are_current(name: str) -> None:
    """`make docs` writes them."""
    document, generate = GENERATOR.PARTS[name]
    text = document.read_text(encoding="utf-8")
    assert GENERATOR.written(name, text, generate()) == text, f"run `make docs`: {document.name}, {name}"


def test_the_page_of_commands_is_current() -> None:
    """`make docs` regenerates it."""
    page = GENERATED.read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"`gap-export {name}`" in page, f"run `make docs`: {name} is missing"
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if option.startswith("--") and option != "--help":
                    assert option in page, f"run `make docs`: {name} {option} is missing"


def test_help_of_every_command_is_a_sentence() -> None:
    group = typer.main.get_command(app)
    for name in group.commands:  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert group.commands[name].help, f"{name} has no help text"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep": "0.1:0.25:1.0"},
        {"pruner": "trim"},
        {"pruner": "prumerge", "keep": "adaptive", "keep_bound": 1.0},
    ],
    ids=["fixed", "chosen", "text", "adaptive"],
)
def test_the_example_program_answers_like_the_package(
    changes: dict[str, Any], tiny_bundle: Callable[..., Bundle]
) -> None:
    """It uses none of the package: position ids and slots come from the graphs and the page alone."""
    bundle, image, expression = (
        tiny_bundle(**changes),
        ROOT / "docs" / "images" / "scene.png",
        "the red one",
    )
    program = [
        sys.executable,
        str(ROOT / "docs" / "drive_a_bundle.py"),
        str(bundle.folder),
        str(image),
        expression,
    ]
    said = subprocess.run(program, check=True, capture_output=True, text=True).stdout.strip()
    session = open_session(bundle, "onnxruntime", threads=1)
    (answer,) = Grounder(bundle).ground(session, [load_image(image)], [expression]).answers
    assert answer.text
    assert said == answer.text


def test_the_example_program_says_how_it_is_called() -> None:
    program = [sys.executable, str(ROOT / "docs" / "drive_a_bundle.py"), "a bundle alone"]
    done = subprocess.run(program, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "drive_a_bundle.py BUNDLE IMAGE" in done.stderr
    assert "Traceback" not in done.stderr
