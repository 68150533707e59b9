"""Is this session right? It is asked before it serves: the very one that will.

    hashes -> lint -> the golden request: the stored answer -> in several rows at once: the same -> with wrong position ids: another answer

A session that renumbers gives the answer of wrong ids, or does not notice them. One that is wrong only where rows share a step, in rows behind the
first, or in copies of rows, gives another answer there. None of these becomes ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.golden import (
    MAX_PERTURBED_IOU,
    MIN_IOU,
    WRONG_IDS,
    GoldenRequest,
    golden_image,
    overlap,
)
from gap_export.environment import missing_package
from gap_export.errors import BundleError, GapExportError, GateError, InputError, LintError
from gap_export.positions import Placement, PositionPolicy
from gap_export.runtime.grounder import Grounder
from gap_export.serving.engine import Engine
from gap_export.serving.work import Expression, Refused, Result, Work

_SECONDS = 600.0
"""After which a session counts as one that does not answer."""
_ROUNDED = {"bf16", "f16"}
"""Types of activations that a runtime was asked for, in its name: tokens of fp32 are not promised then."""
_ROWS = 4
"""Most rows that are asked at once: one that is read, copies of it, and one that is read beside them."""


@dataclass(frozen=True)
class ReadyReport:
    """What a session has shown.

    Attributes:
        decided_by: `boxes` or `logits`.
        right: IoU with the stored box; where logits decide, the distance from the right ones, as a share of that of the wrong ones.
        perturbed: that of the answer with wrong ids.
        tokens_equal: whether all tokens are the stored ones; None where the precision does not promise it.
        rows: how many have answered at once, each of them rightly.
        linted: names of the graphs that lint has passed.
        not_linted: why there are none; "" where there are.
        seconds: that it took.
    """

    decided_by: str
    right: float
    perturbed: float
    tokens_equal: bool | None
    rows: int
    linted: tuple[str, ...]
    not_linted: str
    seconds: float

    def __str__(self) -> str:
        measure = "IoU" if self.decided_by == "boxes" else "distance of logits"
        lint = f"{len(self.linted)} graphs linted" if self.linted else f"not linted: {self.not_linted}"
        tokens = {True: ", tokens equal", False: ", tokens differ", None: ""}[self.tokens_equal]
        together = f", the same in {self.rows} rows at once" if self.rows > 1 else ""
        return (
            f"golden request: {measure} {self.right:.3f}{tokens}, with wrong ids {self.perturbed:.3f}{together}; {lint}; "
            f"{self.seconds:.1f} s"
        )


def check_baseline(bundle: Bundle, *, allow_baselines: bool) -> None:
    """Refuse a bundle that renumbers on purpose, unless that is allowed.

    Args:
        bundle: opened.
        allow_baselines: whether it is.

    Raises:
        BundleError: it is not.
    """
    policy = bundle.manifest.pruning.positions
    if policy is not PositionPolicy.GAP and not allow_baselines:
        raise BundleError(
            f"is a baseline: its position ids are {policy}",
            subject=str(bundle.folder),
            hint="serve one that was built with --positions gap, or add --allow-baselines",
        )


def check_golden(bundle: Bundle) -> GoldenRequest:
    """The golden request of a bundle that is to be served.

    Args:
        bundle: opened.

    Raises:
        BundleError: it has none, or it cannot be read.
    """
    golden = bundle.golden
    if golden is None:
        raise BundleError(
            "has no golden request, so that nothing tells whether a session of it is right",
            subject=str(bundle.folder),
            hint=f"add one: gap-export golden {bundle.folder}",
        )
    return golden


def check_ready(bundle: Bundle, engine: Engine, *, allow_baselines: bool = False) -> ReadyReport:
    """Whether a session may serve: files as they were written, graphs that lint passes, and the golden request answered.

    Args:
        bundle: that was loaded.
        engine: with the session that is to serve.
        allow_baselines: whether a bundle whose ids are renumbered on purpose may be served.

    Returns:
        What was measured.

    Raises:
        BundleError: a file was changed, there is no golden request, or the bundle is a baseline.
        GateError: the session does not answer as PyTorch does, or wrong position ids change nothing.
    """
    began = time.monotonic()
    check_baseline(bundle, allow_baselines=allow_baselines)
    golden = check_golden(bundle)
    reread = open_bundle(bundle.folder, every_hash=True)
    if reread.written_as(bundle.box_format).manifest != engine.bundle.manifest:
        raise BundleError(
            "is another one than was loaded: its manifest was changed meanwhile",
            subject=str(bundle.folder),
            hint="load it again",
        )
    linted, not_linted = _lint(reread)
    request = _Golden(reread, golden, engine)
    right = request.ask()
    measured, tokens_equal = request.measure(right), request.tokens_equal(right)
    request.check_right(right)
    rows = min(engine.rows, _ROWS)
    for answer in request.ask_in_rows(rows):
        request.check_right(answer, where=f" in one of {rows} rows")
    perturbed = request.measure(request.ask(WRONG_IDS[golden.wrong_ids]))
    request.check_perturbed(perturbed)
    return ReadyReport(
        decided_by=golden.decided_by,
        right=measured,
        perturbed=perturbed,
        tokens_equal=tokens_equal,
        rows=rows,
        linted=linted,
        not_linted=not_linted,
        seconds=time.monotonic() - began,
    )


class _Golden:
    """The golden request, asked through an engine.

    Args:
        bundle: read anew, in its own box format.
        golden: of it.
        engine: with the session that is to serve.

    Raises:
        BundleError: its image cannot be read.
    """

    def __init__(self, bundle: Bundle, golden: GoldenRequest, engine: Engine) -> None:
        self._bundle, self._golden, self._engine = bundle, golden, engine
        self._grounder = Grounder(bundle)
        self._images = [golden_image(bundle.folder, golden)] * self._grounder.images_per_prompt

    def ask(self, perturb: Callable[[Placement], Placement] | None = None) -> Result:
        """The engine's answer.

        Args:
            perturb: makes its position ids wrong.

        Raises:
            GateError: there is none.
            Refused: the engine is told to stop.
        """
        (answer,) = self._answers([self._work(perturb=perturb)])
        return answer

    def ask_in_rows(self, rows: int) -> list[Result]:
        """The engine's answers in so many rows at once; none for a single one.

        Args:
            rows: how many: the questions of one request are read once and copied, and another is read behind them.

        Raises:
            GateError: there is none.
            Refused: the engine is told to stop.
        """
        if rows == 1:
            return []
        works = [self._work(max(2, rows - 1)), self._work()]
        return self._answers(works[: self._engine.most_waiting])

    def _work(self, questions: int = 1, *, perturb: Callable[[Placement], Placement] | None = None) -> Work:
        chosen = self._bundle.manifest.pruning.keep_range is not None
        return Work(
            questions=(Expression(self._golden.expression),) * questions,
            open_images=lambda: self._images,
            images=len(self._images),
            keep=self._golden.keep if chosen else None,
            deadline=_SECONDS,
            trace=True,
            perturb=perturb,
            is_check=True,
        )

    def _answers(self, works: Sequence[Work]) -> list[Result]:
        answers = []
        for outcome in [each for ticket in self._engine.submit_all(works) for each in ticket.result()]:
            if isinstance(outcome, Refused) and outcome.reason == "draining":
                raise outcome
            if isinstance(outcome, GapExportError):
                raise self._failed(
                    f"does not answer its golden request: {outcome.subject}: {outcome.message}"
                ) from outcome
            answers.append(outcome)
        return answers

    def measure(self, result: Result) -> float:
        """IoU with the stored box; where logits decide, the distance from the right ones."""
        if self._golden.decided_by == "boxes":
            boxes = self._grounder.boxes_in(result.text, self._golden.size)
            return overlap(boxes[0] if boxes else None, self._golden.right.box)
        assert result.trace is not None
        return self._golden.distance(result.trace.first_logits)

    def tokens_equal(self, result: Result) -> bool | None:
        """Whether tokens are the stored ones; None where activations are rounded, which promises none."""
        if self._bundle.manifest.precision != "fp32" or _ROUNDED & set(self._engine.backend.split(":")):
            return None
        return result.ids == self._golden.right.token_ids

    def check_right(self, result: Result, where: str = "") -> None:
        """Refuse a session with another answer, or whose position ids do not follow from what was kept.

        Args:
            result: the answer.
            where: it was made, for the error.

        Raises:
            GateError: it has, or they do not.
        """
        measured = self.measure(result)
        if self._golden.decided_by == "boxes" and measured < MIN_IOU:
            raise self._failed(
                f"answers its golden request{where} with another box than PyTorch: their IoU is {measured:.3f}, and {MIN_IOU} is required"
            )
        if self._golden.decided_by == "logits" and not measured <= self._golden.tolerance:
            raise self._failed(
                f"answers its golden request{where} with other logits than PyTorch: their distance is {measured:.3f} of that of wrong ids, "
                f"and at most {self._golden.tolerance:g} is required"
            )
        if self.tokens_equal(result) is False:
            raise self._failed(f"answers its golden request{where} with other tokens than PyTorch")
        assert result.trace is not None
        if result.trace.fault is not None:
            raise self._failed(
                f"places its golden request{where} otherwise than its manifest says: {result.trace.fault}"
            )

    def check_perturbed(self, measured: float) -> None:
        """Refuse a session that wrong ids do not change.

        Raises:
            GateError: they do not.
        """
        if self._golden.decided_by == "boxes":
            if measured >= MAX_PERTURBED_IOU:
                raise self._failed(
                    f"gives its golden request the same box with wrong position ids (IoU {measured:.3f}, and below {MAX_PERTURBED_IOU} "
                    "is required): it does not read them"
                )
        elif not measured > self._golden.tolerance:
            raise self._failed(
                f"gives its golden request the same logits with wrong position ids (distance {measured:.3f}, and above "
                f"{self._golden.tolerance:g} is required): it does not read them"
            )

    def _failed(self, message: str) -> GateError:
        return GateError(
            f"{message}; it is not ready",
            subject=f"{self._bundle.folder} in {self._engine.backend}",
            hint="build it again, and compare it with PyTorch: gap-export validate",
        )


def _lint(bundle: Bundle) -> tuple[tuple[str, ...], str]:
    """Names of the graphs that lint has passed; or why it was not asked.

    Raises:
        GateError: a graph would not carry position ids.
    """
    try:
        from gap_export import linter
    except ImportError as error:
        missing = missing_package(error, "lint")
        return (), f"{missing.subject} {missing.message}"
    manifest = bundle.manifest
    for name, graph in manifest.graphs.items():
        own = graph.spec.name
        try:
            linter.lint_graph(
                bundle.graph_path(name),
                kind="decoder" if own == "prefill" or own == "decode" else own,
                strict=True,
                policy=manifest.pruning.positions,
                mask=manifest.spec.attention_mask,
            ).raise_for_errors()
        except (LintError, InputError) as error:
            raise GateError(
                f"does not pass lint: {error.message}; the bundle is not ready",
                subject=error.subject,
                hint="build it again",
            ) from error
    return tuple(manifest.graphs), ""
