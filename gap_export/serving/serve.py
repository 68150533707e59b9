"""A bundle, served over HTTP until it is told to stop: `gap-export serve` is this function.

bundle -> refused, or loaded -> listening -> the very session checked: ready -> SIGTERM: what was admitted is answered
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import InputError
from gap_export.inputs.chat.conversation import Turn
from gap_export.runtime.model import Model, load
from gap_export.serving.adapt import controller
from gap_export.serving.engine import Engine
from gap_export.serving.http.journal import LOG
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.limits import EngineLimits
from gap_export.serving.metrics import ServerMetrics
from gap_export.serving.ready import check_baseline, check_golden, check_ready
from gap_export.serving.receipts import receipt_of
from gap_export.serving.server import Server, ServerOptions, is_loopback, listen
from gap_export.serving.service import Service
from gap_export.terminal import Terminal

_LONGEST_NAME = 200


@dataclass(frozen=True)
class AdaptOptions:
    """How the server may choose fewer visual tokens while requests wait; see `adapt.controller`.

    Attributes:
        ratios: `1.0:0.25`, the largest and the smallest that may be taken.
        max_accuracy_drop: loss of accuracy that is allowed.
        target_delay: seconds that requests may wait.
    """

    ratios: str
    max_accuracy_drop: float = 0.03
    target_delay: float = 0.5


def serve(
    bundle: Bundle | Path | str,
    *,
    names: Sequence[str] = (),
    limits: EngineLimits | None = None,
    settings: HttpSettings | None = None,
    options: ServerOptions | None = None,
    allow_anonymous: bool = False,
    adapt: AdaptOptions | None = None,
    backend: str = "onnxruntime",
    threads: int = 0,
    box_format: str | None = None,
    on_listening: Callable[[Server], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve a bundle, until SIGTERM, Ctrl-C, or `stop` of the server that `on_listening` is told of.

    Args:
        bundle: its folder, or what `open_bundle` gave.
        names: of the model, for clients; the bundle's own by default.
        limits: of rows, queue and threads.
        settings: of the HTTP side: keys, bounds of what is sent, whether baselines are allowed.
        options: address, port, and how it ends.
        allow_anonymous: whether it may listen beyond this machine without keys.
        adapt: whether fewer visual tokens may be kept under load, and which.
        backend: name of the runtime.
        threads: on the CPU; 0 lets the runtime choose.
        box_format: how boxes are written in its answers, where not as the bundle says.
        on_listening: told of the server when connections are accepted.
        tell: told, in a line each, what was measured and chosen, and that it is ready.

    Raises:
        InputError: an address, a name or a format that is none, or others could reach it without keys.
        BundleError: there is no bundle, it has no golden request, it is a baseline, or there is no record for `adapt`.
        GateError: its session does not compute what it should; it was never ready.
        SessionError: there is no such backend, or it failed.
        MissingRequirementError: the runtime is not installed.
    """
    limits, settings, options = (
        limits or EngineLimits(),
        settings or HttpSettings(),
        options or ServerOptions(),
    )
    _check_names(names)
    _check_host(options.host, settings.keys is not None or allow_anonymous)
    opened = (bundle if isinstance(bundle, Bundle) else open_bundle(bundle)).written_as(box_format)
    check_baseline(opened, allow_baselines=settings.allow_baselines)
    check_golden(opened)
    choose_keep = None
    if adapt is not None:
        choose_keep = controller(opened, adapt.ratios, adapt.max_accuracy_drop, adapt.target_delay)
        tell(choose_keep.note)
    metrics = ServerMetrics()
    with (
        _logged(),
        listen(options) as listening,
        load(opened, backend=backend, threads=threads, box_format=box_format) as model,
        Engine(model, limits, observer=metrics, choose_keep=choose_keep) as engine,
    ):
        metrics.watch(engine)

        def check() -> None:
            tell(str(check_ready(model.bundle, engine, allow_baselines=settings.allow_baselines)))
            try:
                _write_a_prompt(model)
            except InputError as error:  # boxes are answered all the same
                tell(f"free questions will fail: {error.subject} {error.message}")

        first, *aliases = names or (opened.manifest.name,)
        service = Service(
            engine, first, aliases=tuple(aliases), check=check, metrics=metrics, receipt_of=receipt_of
        )
        server = Server(service, settings, options, on_listening=on_listening, on_ready=lambda: tell("ready"))
        server.run([listening])
    if server.failure is not None:
        raise server.failure


def _check_names(names: Sequence[str]) -> None:
    """Refuse names that cannot stand in an address.

    Raises:
        InputError: the first.
    """
    for name in names:
        if not (0 < len(name) <= _LONGEST_NAME and name.isascii() and name.isprintable() and " " not in name):
            raise InputError(
                f"is not 1 to {_LONGEST_NAME} characters of ASCII without blanks",
                subject=f"name {name[:80]!r}",
                hint="choose another --name or --alias",
            )


def _check_host(host: str, allowed: bool) -> None:
    """Refuse to listen beyond this machine where whoever comes is answered.

    Raises:
        InputError: without keys, and not allowed.
    """
    if not allowed and not is_loopback(host):
        raise InputError(
            "is reached from other machines, and no keys are asked for",
            subject=f"--host {host}",
            hint="give --api-keys FILE, or --allow-anonymous where a proxy asks for keys",
        )


def _write_a_prompt(model: Model) -> None:
    """Have the process that renders chat templates started by now, and not by the first question.

    Raises:
        InputError: the template refuses the plainest question.
    """
    manifest = model.bundle.manifest
    if manifest.chat is not None:
        model.prompts.tokens.prompt([Turn("user", "?", manifest.prompt.images)])


class _ToStandardError(logging.Handler):
    """Lines to standard error, as it is by then; one that cannot be written is left out."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = Terminal(stderr=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self._terminal.write_line(self.format(record))


@contextmanager
def _logged() -> Iterator[None]:
    """A line for every request, and for what failed."""
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    before = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bounds of images say it
            yield
    finally:
        LOG.removeHandler(handler)
        LOG.level, LOG.propagate = before
