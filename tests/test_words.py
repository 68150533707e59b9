"""Words: the field's own instead of private ones, modules under their own names, docstrings that say something themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import gap_export
from tests.test_architecture import MODULES

PACKAGE = Path(gap_export.__file__).parent
ROOT = PACKAGE.parent

BANNED = {
    # Names
    r"picture": "image",
    r"fewest": "minimum, min_",
    r"(?<!un)usual\b": "typical, default",
    r"hollow": "fake, meta",
    r"contender": "candidate",
    r"\bdemands?\b": "threshold; require",
    r"\bstrateg(y|ies)\b(?! =|\"|_)": "pruner",
    r"\brooms?\b": "package, space, capacity",
    r"\braters?\b": "scoring queries",
    r"\bplanes\b": "deepstack_levels",
    r"\bjudged\b": "checked, under test",
    r"\bdeal(s|t|ing)? (to|out|with their)\b|\bdealt\b": "dispatch",
    r"\bhired?\b": "start",
    r"looks_ahead": "uses_next_layer_attention",
    r"in_steps\b": "sequential",
    r"IN_MATMULS": "DECOMPOSED",
    r"\bknock": "check_reachable",
    r"PATIENCE": "TIMEOUT",
    r"EnvironmentLacks|\bDemands\b|\bPieces\b|\bassembly\b|ModelFacts|TowerPart|tower_lacks": "see the glossary",
    r"\bAsked\b|Answerer|answer_rest": "EvalOptions, Evaluator, continue_answers",
    r"\b(_?refuse|require)_\w+": "check_",
    r"\b(Seen|Shown|Gap)\b": "VisionFeatures, ImageFeatures, Margin",
    r"seen_size": "resized",
    # Phrases
    r"right by definition": "the reference run",
    r"(may|can) be killed|goes? on\b|gone on with": "can be interrupted; rerun the same command to resume; continues",
    r"los(es|e|ing) little enough": "within the accuracy tolerance",
    r"large activations get": "activation ranges (amax)",
    r"telling words": "relevant text tokens",
    r"takes? the ids away": "what breaks position ids",
    r"by a hair\b": "near-tie",
    r"no films": "video is not supported",
    r"\bof ours\b": "name what it is",
    r"\bnobody\b|\beveryone\b": "name who",
    r"takes? turns": "interleaved",
    r"code of its own": "requires remote code",
}
"""What is not written in the package and its documents -> what is."""

BACK_REFERENCE = re.compile(r"(?i)(the same\b|as (above|there|in)\b|see\b|like )")
"""How a docstring begins that says nothing itself."""

NAMED_BY_CUSTOM = {
    "gap_export",
    "numpy",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "torch.nn.functional",
    "pyarrow.parquet",
}
"""Packages that have a customary short name; `gap` is that of the public API."""


def documents() -> Iterator[Path]:
    yield from sorted(PACKAGE.rglob("*.py"))
    yield from sorted(PACKAGE.rglob("*.j2"))
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))


def test_words_of_the_field() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, better: {better}"
        for path in documents()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word, better in BANNED.items()
        for match in re.finditer(word, line)
    ]
    assert not found, "\n".join(found)


def test_modules_are_called_by_their_own_names() -> None:
    found = [
        f"{module}: {alias.name} as {alias.asname}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for alias, name in imported(node)
        if alias.asname not in (None, alias.name)
        and (name.removeprefix("gap_export.") in MODULES or isinstance(node, ast.Import))
        and name not in NAMED_BY_CUSTOM
    ]
    assert not found, "\n".join(found)


def imported(node: ast.AST) -> Iterator[tuple[ast.alias, str]]:
    """Each thing that an import statement binds, with its full name."""
    if isinstance(node, ast.Import):
        yield from ((alias, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((alias, f"{node.module}.{alias.name}") for alias in node.names)


def test_docstrings_say_something_themselves() -> None:
    found = [
        f"{module}, line {getattr(node, 'lineno', 1)}: {line.strip()}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        for line in back_references(ast.get_docstring(node) or "")
    ]
    assert not found, "\n".join(found)


def back_references(docstring: str) -> Iterator[str]:
    """The first line where it only points elsewhere, and entries of arguments and attributes that do."""
    first, *others = docstring.splitlines() or [""]
    if BACK_REFERENCE.match(first):
        yield first
    for line in others:
        entry = re.match(r"\s+\w+: (.*)", line)
        if entry and BACK_REFERENCE.match(entry[1]):
            yield line


def test_what_is_banned_is_found() -> None:
    """The checks themselves, on text that has what they look for."""
    assert any(re.search(word, "whoever gets the picture") for word in BANNED)
    assert list(back_references("See `Session`.\n\nArgs:\n    keep: the same.\n    kept: K.")) == [
        "See `Session`.",
        "    keep: the same.",
    ]
    (node,) = ast.parse("from gap_export.evaluation import sweep as room").body
    assert [(name, alias.asname) for alias, name in imported(node)] == [
        ("gap_export.evaluation.sweep", "room")
    ]
