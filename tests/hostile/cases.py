"""Every hostile input: of every option and argument, of every path, of every kind of file, and of what a command finds around it."""

from __future__ import annotations

import glob
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.hostile.calls import CALLS, Call, call, calls_of
from tests.hostile.child import PLAIN, Environment
from tests.hostile.commands import Meaning, Parameter
from tests.hostile.nodes import TO_READ, TO_WRITE, Node
from tests.hostile.sources import NODES, SOURCES, Source
from tests.hostile.surroundings import ENVIRONMENTS, Surroundings, mount
from tests.hostile.texts import shown
from tests.hostile.values import values_of
from tests.hostile.world import World

VALUES, READ, WRITTEN, SWITCHES, AROUND = (
    "values",
    "paths read",
    "paths written",
    "command lines",
    "environments",
)
"""Kinds of inputs that are no files; those have the names of their kinds."""

_SUFFIXES = {
    "build --model": ".yaml",
    "sweep --model": ".yaml",
    "recommend --model": ".yaml",
    **{f"{command} --{option}": ".png" for command in ("run", "ask") for option in ("draw", "image")},
}


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        kind: of input, for the table.
        name: unique among those of its kind and call.
        about: option, argument or file that it is an input of, as `coverage.py` names them.
        twin: the harmless call that it is made from.
        call: as it is run.
        make: changes the working folder first; returns False where this machine does not let it.
        expect: what must come of it: `REFUSED`, `ACCEPTED`, or empty.
        environment: that it runs in.
        says_so: whether a refusal can be read.
    """

    kind: str
    name: str
    about: str
    twin: Call
    call: Call
    make: Callable[[Path], bool] = lambda _: True
    expect: str = ""
    environment: Environment = PLAIN
    says_so: bool = True

    @property
    def id(self) -> str:
        """For messages, and to run it alone."""
        return f"{self.twin.name}: {self.about}: {self.name}"


def cases(world: World, parameters: Iterable[Parameter], *, seed: int, share: float = 1.0) -> Iterator[Case]:
    """All inputs, in an order that does not depend on the machine.

    Args:
        world: the harmless files.
        parameters: of the command line.
        seed: of what is chosen at random.
        share: of random damages that are made.
    """
    parameters = tuple(parameters)
    for command in dict.fromkeys(parameter.command for parameter in parameters):
        yield from of_surroundings(command)
    for source in SOURCES:
        yield from of_source(source, world, seed, share)
    for parameter in parameters:
        yield from of_parameter(parameter)


def of_parameter(parameter: Parameter) -> Iterator[Case]:
    """Inputs of one option or argument."""
    calls = calls_of(parameter)
    if not calls:
        return
    twin, meaning = calls[0], parameter.meaning
    if meaning in (Meaning.READ_FILE, Meaning.READ_FOLDER):
        yield from (_reading(parameter, twin, node) for node in TO_READ)
    elif meaning in (Meaning.WRITTEN_FILE, Meaning.WRITTEN_FOLDER):
        yield from (_writing(parameter, twin, node) for node in TO_WRITE)
        yield from _onto_inputs(parameter, twin)
        for name, full in (("full", True), ("read-only", False)):
            changed = replace(
                twin.given(parameter, "disk/out" + _SUFFIXES.get(parameter.name, "")), makes=("disk",)
            )
            disk = Environment(f"a {name} disk", mount("disk", full=full), needs_mount=True)
            yield Case(
                WRITTEN,
                f"on a {name} disk",
                parameter.name,
                twin,
                changed,
                expect="refused",
                environment=disk,
            )
    for value, expect in values_of(parameter) if meaning is None or not parameter.names_a_file else ():
        if _is_harmless(parameter, value):
            continue
        changed = twin.given(parameter, value)
        yield Case(VALUES, shown(value), parameter.name, twin, changed, expect=expect)
    yield from _lines(parameter, twin)


def _is_harmless(parameter: Parameter, value: str) -> bool:
    """A dash begins an option, where a value goes by its place."""
    return parameter.is_argument and value.startswith("-")


def _lines(parameter: Parameter, twin: Call) -> Iterator[Case]:
    """Command lines that are no such: switches with values, options without, options twice."""
    name = parameter.name
    if parameter.is_argument:
        line = replace(twin, arguments=(*twin.arguments, *["x"] * 3))
        yield Case(SWITCHES, "three arguments more", name, twin, line, expect="")
        return
    if parameter.kind is bool:
        for value in ("yes", "", "0", "[/red]"):
            given = replace(twin, further=(f"{parameter.flag}={value}",))
            yield Case(SWITCHES, f"={value}", name, twin, given, expect="refused")
        if parameter.flag != "--ray":  # would start a cluster
            yield Case(SWITCHES, "twice", name, twin, replace(twin, further=(parameter.flag, parameter.flag)))
        return
    yield Case(SWITCHES, "no value", name, twin, replace(twin, further=(parameter.flag,)), expect="refused")
    yield Case(
        SWITCHES, "misspelt", name, twin, replace(twin, further=(f"{parameter.flag}x", "1")), expect="refused"
    )
    yield Case(
        SWITCHES,
        "with markup",
        name,
        twin,
        replace(twin, further=(f"{parameter.flag}[/red]", "1")),
        expect="refused",
    )


_UNREAD = {
    "report --images": "a page without images says so",
    "eval --images": "images that are not there are skipped, and said to be",
}
"""Paths that a call need not read, and why."""
_HOLDS_THEM = {
    ("recommend --images", "the folder above"),
    ("serve --api-keys", "a file of another kind"),
}
"""Images are found below a folder, however far; and any line of text is a key."""


def _reading(parameter: Parameter, twin: Call, node: Node) -> Case:
    place = "placed" + _SUFFIXES.get(parameter.name, "")
    typed = node.given(place)
    unread = parameter.name in _UNREAD or (parameter.name, node.name) in _HOLDS_THEM
    expect = "" if unread else node.expect
    if parameter.is_argument and typed.startswith("-"):
        typed = f"./{typed}"
    return Case(
        READ,
        node.name,
        parameter.name,
        twin,
        replace(twin.given(parameter, typed), rewrites=() if expect else twin.rewrites),
        lambda work: node.make(work, place),
        expect,
    )


def _writing(parameter: Parameter, twin: Call, node: Node) -> Case:
    suffix = _SUFFIXES.get(parameter.name, "")
    place = f"placed{suffix}"
    typed = node.given(place)
    if (typed and node.expect == "" and not typed.endswith(("/", suffix))) or typed in ("...",):
        typed += suffix
    made = glob.escape(os.path.normpath(typed)) if typed.strip() else typed
    parts = made.split("/")
    makes = () if node.expect else (*("/".join(parts[: end + 1]) for end in range(len(parts))), f"{made}/*")
    if node.name == "dangling link":
        makes = (*makes, "absent", "absent/*")
    return Case(
        WRITTEN,
        node.name,
        parameter.name,
        twin,
        replace(
            twin.given(parameter, typed),
            makes=makes,
            rewrites=(made,) if node.name == "dangling link" else (),
        ),
        lambda work: node.make(work, place),
        node.expect,
    )


def _onto_inputs(parameter: Parameter, twin: Call) -> Iterator[Case]:
    """The output is what the command reads: as it is, by another name, and below it.

    Below a checkpoint or a tower it may be put (`MODEL/onnx`): nothing lists their files.
    """
    for name in twin.needs:
        for how, typed in (
            ("as it is", name),
            ("by another name", f"./{name}/../{name}"),
            *([] if name in ("checkpoint", "tower") else [("below", f"{name}/x")]),
        ):
            yield Case(
                WRITTEN,
                f"onto its input {name}, {how}",
                parameter.name,
                twin,
                replace(twin.given(parameter, typed), makes=(), rewrites=()),
                expect="refused",
            )
        below = f"{name}/x"
        yield Case(
            WRITTEN,
            f"below its input {name}",
            parameter.name,
            twin,
            replace(twin.given(parameter, below), makes=(below, f"{below}/*"), rewrites=()),
        )
        yield Case(
            WRITTEN,
            f"onto its input {name}, by a link",
            parameter.name,
            twin,
            replace(twin.given(parameter, "link"), makes=(), rewrites=()),
            lambda work, name=name: (work / "link").symlink_to(name) is None,
            "refused",
        )


def of_source(source: Source, world: World, seed: int, share: float) -> Iterator[Case]:
    """Inputs of one file."""
    twin = call(source.call)
    origin = source.placed or world.path(source.path.partition("/")[0]).joinpath(*source.path.split("/")[1:])
    content = origin.read_bytes()
    rng = random.Random(hashlib.sha256(f"{seed} {source.name}".encode()).digest())
    for name, damaged, expect in source.damages(content, rng, share):

        def make(work: Path, damaged: bytes = damaged) -> bool:
            source.prepare(work)
            source.write(work, damaged)
            return True

        yield Case(source.kind.name, name, source.name, twin, twin, make, expect)
    # Where the call writes the file, nothing in its place is no attack.
    written = source.path in twin.rewrites
    for node in (node for node in NODES if not (written and node.name in ("absent", "dangling link"))):

        def place(work: Path, name: str = node.name) -> bool:
            source.prepare(work)
            return source.replace_by_node(work, name)

        expect = node.expect if source.strict else ""
        yield Case(source.kind.name, f"{node.name} in its place", source.name, twin, twin, place, expect)


def of_surroundings(command: str) -> Iterator[Case]:
    """Environments for the first call of a command."""
    calls = calls_of(Parameter(command, "", bool, True))
    for around in ENVIRONMENTS if calls else ():
        yield _around(calls[0], around)
        refused = replace(calls[0], options={**calls[0].options, "--\u00fcn\U0001f600": "x"})
        yield Case(
            AROUND,
            f"{around.environment.name}, refused",
            command,
            calls[0],
            refused,
            around.make,
            "refused",
            around.environment,
            around.says_so and not around.environment.name.startswith("error"),
        )


def _around(twin: Call, around: Surroundings) -> Case:
    given = (
        replace(twin, options={**twin.options, "--json": True})
        if around.as_json and any("--json" in each.options for each in CALLS if each.command == twin.command)
        else twin
    )
    return Case(
        AROUND,
        around.environment.name,
        twin.command,
        twin,
        given,
        around.make,
        around.expect,
        around.environment,
        around.says_so,
    )
