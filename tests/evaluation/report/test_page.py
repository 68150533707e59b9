"""The page: what stands on it, and how it looks and behaves in a real browser."""

from __future__ import annotations

import html
import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.evaluation.gates import GROUNDING
from gap_export.evaluation.refer.compare import compare
from gap_export.evaluation.refer.dataset import open_dataset
from gap_export.evaluation.report.page import page
from gap_export.evaluation.report.runs import open_runs
from tests.browser import CHROMIUM, FLAGS, browser

from .conftest import gap_export

pytestmark = pytest.mark.slow

# What a person would do and see, done inside a copy of the page; the page itself has no script.
PROBE = """<script>
addEventListener('load', async () => {
  await new Promise(done => setTimeout(done, 200));
  const shown = selector => [...document.querySelectorAll(selector)].filter(e => getComputedStyle(e).display != 'none').length;
  const before = {}, after = {};
  for (const name of ['truth.box', 'reference.box', 'subject.box', 'pruned']) {
    before[name] = shown('.overlays .' + name);
    const box = document.getElementById('show-' + name.split('.')[0]);
    if (box) { box.click(); after[name] = shown('.overlays .' + name); box.click(); }
  }
  const facts = {
    before, after, fetched: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length,
    wide: document.documentElement.scrollWidth, window: innerWidth,
    images: [...document.querySelectorAll('svg.image')].map(e => Math.min(e.getBoundingClientRect().width, e.getBoundingClientRect().height)),
    plots: [...document.querySelectorAll('.plots svg')].map(e => e.getBoundingClientRect().height),
  };
  const found = document.createElement('pre');
  found.id = 'facts'; found.textContent = JSON.stringify(facts); document.body.append(found);
});
</script>"""


def facts_of(path: Path, tmp_path: Path, width: int) -> Any:
    """What the probe found in a window of that width."""
    assert CHROMIUM is not None
    probed = tmp_path / f"probed-{width}.html"
    probed.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    size = f"--window-size={width},900"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, size, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000",
         "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (facts,) = re.findall(r'<pre id="facts">(.*?)</pre>', done.stdout)
    return json.loads(html.unescape(facts))


class Tags(HTMLParser):
    """Elements that must be closed, in order; and where a page would reach out of itself."""

    VOID = frozenset(("meta", "input", "br", "img", "link", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.references += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def compared(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of PyTorch against the engine."""
    path = tmp_path_factory.mktemp("pages") / "compared.html"
    gap_export("report", evaluated / "torch", evaluated / "ort", "-o", path)
    return path


@pytest.fixture(scope="module")
def bundle_page(recommended: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a bundle."""
    path = tmp_path_factory.mktemp("pages") / "bundle.html"
    gap_export("report", recommended, "-o", path, "--no-pruners")
    return path


@pytest.mark.parametrize("name", ["compared", "bundle_page"])
def test_it_is_sound_and_reaches_for_nothing(request: pytest.FixtureRequest, name: str) -> None:
    text = request.getfixturevalue(name).read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not tags.scripts
    assert tags.references
    assert all(reference.startswith(("data:image/", "#")) for reference in tags.references)
    assert not re.search(r"url\((?!#)|@import", text)


def test_figures_are_those_of_the_comparison(evaluated: Path, compared: Path) -> None:
    text = html.unescape(compared.read_text())
    reported = open_runs([evaluated / "torch", evaluated / "ort"], "unc")
    result = compare(reported.reference.run, reported.subject.run, GROUNDING, worst=0)
    assert "grounds as <b>torch</b> does: every gate is met" in text
    assert f"{100 * result.subject_accuracy:.2f}" in text
    for gate in result.gates:
        assert gate.name in text
    assert "Both runs give the same box for every expression" in text
    facts = (
        "manifest sha256",
        "annotations",
        "onnxruntime ",
        "unc (ConvLLaVA's evaluator): boxes of the padded square",
    )
    assert all(fact in text for fact in facts)
    for pruner in ("divprune", "visionzip"):
        assert f"<b>{pruner}</b>" in text


def test_a_gate_that_is_not_met_is_said(evaluated: Path) -> None:
    reported = open_runs([evaluated / "torch", evaluated / "ort"], "unc")
    reference, subject = reported.runs
    boxes: list[Any] = [(0.0, 0.0, 1.0, 1.0)] * len(subject.run.ids)
    beside = replace(subject, run=replace(subject.run, boxes=boxes))
    text = page(replace(reported, runs=(reference, beside)), GROUNDING, None, title="t", pruners="no model")
    assert "does not ground as <b>torch</b> does" in text
    assert "not met" in text
    assert "Not drawn: no model" in text
    assert "image not at hand" in text


def test_words_of_others_stay_words(evaluated: Path) -> None:
    """Expressions and answers come from files that anybody may have written."""
    reported = open_runs([evaluated / "ort"], "unc")
    identity = reported.subject.run.ids[0]
    answers = reported.subject.answers
    answers[identity] = replace(
        answers[identity], expression="<script>alert(1)</script>", box=None, text="<b>"
    )
    source = open_dataset("scenes:3").source
    text = page(reported, GROUNDING, source, title="<i>", pruners="-", drawn=12)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<title>&lt;i&gt;</title>" in text


def test_the_share_that_was_recommended_is_marked(bundle_page: Path) -> None:
    text = bundle_page.read_text()
    (subject,) = re.findall(r'<tr class="subject">\s*<td>(.*?)</td>', text)
    assert subject == "scenes-3-all-gap-onnxruntime-keep0.3"
    assert "shares were interleaved in one run" in text
    assert "left out (--no-pruners)" in text


def test_predictions_from_a_file(tmp_path: Path) -> None:
    scenes = open_dataset("scenes").expressions[:4]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"id": e.id, "answer": "[0.1, 0.1, 0.4, 0.4]"}) + "\n" for e in scenes)
    )
    run = tmp_path / "file"
    gap_export(
        "eval", "--predictions", answers, "--family", "llava", "--data", "scenes", "--limit", 4, "-o", run
    )
    gap_export("report", run, "-o", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Patches are not shaded: answers came from a file" in text
    assert "Farthest from the truth" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], "holds no finished evaluation"), (["EVALUATED/bundle"], "has no finished evaluation")],
)
def test_what_cannot_work(evaluated: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    named = [each.replace("EVALUATED", str(evaluated)) for each in arguments]
    message = gap_export("report", *named, "-o", tmp_path / "page.html", code=2)
    assert words in message
    assert "hint" in message
    assert not (tmp_path / "page.html").exists()


@browser
@pytest.mark.parametrize("width", [1300, 420])
def test_in_a_browser(compared: Path, tmp_path: Path, width: int) -> None:
    facts = facts_of(compared, tmp_path, width)
    assert facts["fetched"] == 0
    assert facts["wide"] <= facts["window"], "nothing is cut off at the right"
    assert min(facts["images"]) > 80
    assert min(facts["plots"]) > 150
    assert facts["before"]["truth.box"] == 12
    assert facts["before"]["pruned"] == 12
    for name, count in facts["before"].items():
        assert facts["after"][name] == 0, f"{name}: {count} are still there"


@browser
def test_colours_reach_the_screen(evaluated: Path, tmp_path: Path) -> None:
    """A screenshot holds the green of truths and the amber of the subject's boxes, in places of their own."""
    assert CHROMIUM is not None
    reported = open_runs([evaluated / "ort"], "unc")
    for identity, answer in reported.subject.answers.items():
        beside = tuple((edge + 15) % 40 for edge in answer.truth[:2])
        reported.subject.answers[identity] = replace(answer, box=(*beside, beside[0] + 20, beside[1] + 20))
    compared = tmp_path / "page.html"
    compared.write_text(
        page(reported, GROUNDING, open_dataset("scenes:3").source, title="boxes", pruners="-")
    )
    shot = tmp_path / "page.png"
    subprocess.run(
        [CHROMIUM, *FLAGS, "--window-size=1300,4200", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={shot}", compared.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = np.array(Image.open(shot).convert("RGB"), np.int64).reshape(-1, 3)
    for colour in ((0x00, 0xB3, 0x7A), (0xFF, 0xB0, 0x00)):
        assert (np.abs(pixels - colour).max(axis=1) <= 3).sum() > 2000


def test_nothing_needs_the_builder() -> None:
    """Pages are about what is stored: nothing in `report` but `choices` opens a model."""
    from gap_export.evaluation.report import cases, page, plots, runs

    for module in (cases, page, plots, runs):
        assert module.__file__ is not None
        assert "torch" not in re.findall(r"^(?:from|import) (\w+)", Path(module.__file__).read_text(), re.M)
