"""Builders in a process of their own: the same engines and refusals, and a line where the process ends, by whatever cause."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.manifest import EngineTarget
from gap_export.bundle.spec import GraphSpec, TensorSpec
from gap_export.engine.build import engine_file, engine_from_graph, scratch_of
from gap_export.engine.isolated import Builder
from gap_export.errors import EngineError, MissingRequirementError
from gap_export.progress import Stages

pytest.importorskip("onnx", reason="the test graphs are made with onnx")

Library = Callable[[str], None]
FLOATS = TensorSpec(name="x", dtype="float32", shape=(2, 8))
RESULT = TensorSpec(name="y", dtype="float32", shape=(2, 8))


@pytest.fixture
def builder() -> Iterator[Builder]:
    with Builder() as builder:
        yield builder


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Puts a module in the place of TensorRT-RTX, whose import stands for what its builder does."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def put(code: str) -> None:
        (folder / "tensorrt_rtx.py").write_text(code)

    return put


def void(_: Any) -> None:
    """Nothing."""


def built(builder: Any, made: Any, target: EngineTarget = "tensorrt-rtx", **options: Any) -> Any:
    graph, spec = made
    return builder.engine_from_graph(
        graph, spec, target=target, compute_capabilities=("8.6",), folder=graph.parent, **options
    )


def process_of(builder: Builder) -> subprocess.Popen[bytes]:
    assert builder._process is not None
    return builder._process.running


class TestRealEngines:
    @pytest.fixture(autouse=True)
    def needed(self) -> None:
        pytest.importorskip(
            "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'"
        )

    def test_they_are_those_that_are_built_here(self, builder: Builder, make_decoder: Any) -> None:
        graph, spec = make_decoder()
        stages: list[str] = []
        record = built(builder, (graph, spec), progress=Stages(stages.append))
        first = process_of(builder).pid
        assert (graph.parent / record.file).read_bytes()[1:4] == b"trt"
        assert len(stages) > 3
        folder = graph.parent
        mine = engine_from_graph(
            graph, spec, target="tensorrt-rtx", compute_capabilities=("8.6",), folder=folder
        )
        assert record == mine
        assert built(builder, (graph, spec)) == mine
        assert process_of(builder).pid == first, "the library is loaded once"

    def test_what_the_library_refuses_is_refused_alike(self, builder: Builder, make_decoder: Any) -> None:
        graph, spec = make_decoder()
        graph.write_bytes(b"")
        with pytest.raises(EngineError, match="holds no graph"):
            built(builder, (graph, spec))
        assert built(builder, make_decoder()).file, "and the next one is built"

    def test_an_interruption_does_not_wait_for_the_builder(self, builder: Builder, make_decoder: Any) -> None:
        graph, spec = make_decoder()

        def interrupt(_: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), builder:
            built(builder, (graph, spec), progress=Stages(interrupt))
        assert builder._process is None
        assert not (graph.parent / "engines/tensorrt-rtx/decoder.engine").exists()

    def test_what_an_interrupted_engine_would_say_is_not_the_next_ones(
        self, builder: Builder, make_decoder: Any, make_graph: Any
    ) -> None:
        """Where whoever builds goes on after an exception, in the same block."""

        def fail(_: str) -> None:
            raise RuntimeError("of the progress")

        first = make_decoder()
        with pytest.raises(RuntimeError, match="of the progress"):
            built(builder, first, progress=Stages(fail))
        second = make_graph([FLOATS], [RESULT], lambda graph: void(graph.op("Relu", "x", to="y")))
        record = built(builder, second)
        assert record.file == "engines/tensorrt-rtx/vision.engine"


SEND = """
import os, pickle, sys
from gap_export.engine.builder_process import Stage
said = pickle.dumps(Stage("half"))
os.write(int(sys.argv[1]), {})
os.kill(os.getpid(), 11)
"""


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            EngineError,
            r"graph decoder: TensorRT-RTX's builder crashed on it \(SIGSEGV\) \(build with another pruner",
        ),
        (
            "import os; os.write(2, b'terminate called\\n   what(): no kernel\\n'); os.abort()",
            EngineError,
            r"crashed on it \(SIGABRT\), and printed last: what\(\): no kernel \(",
        ),
        (
            "import os; os.write(2, b'terminate called\\n   what(): std::bad_alloc\\n'); os.abort()",
            MissingRequirementError,
            r"memory, graph decoder: ran out while TensorRT-RTX built the engine \(SIGABRT\)",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            MissingRequirementError,
            r"memory, graph decoder: ran out .* \(SIGKILL\)",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 3)", EngineError, r"\(signal 37\)"),
        ("import os; os._exit(3)", EngineError, r"the process that builds its engine ended \(exit code 3\)"),
        (
            "raise SystemExit('no licence')",
            EngineError,
            r"\(exit code 1\), and printed last: SystemExit: no licence",
        ),
        (SEND.format("said"), EngineError, r"crashed on it \(SIGSEGV\)"),
        (SEND.format("said[:-3]"), EngineError, r"crashed on it \(SIGSEGV\)"),
    ],
)
def test_a_process_that_ends_is_a_line(
    code: str, error: type[Exception], words: str, builder: Builder, library: Library, make_decoder: Any
) -> None:
    library(code)
    graph, spec = make_decoder()
    scratch = scratch_of(engine_file(graph.parent, "tensorrt-rtx", spec.name))
    scratch.parent.mkdir(parents=True)
    scratch.write_bytes(b"half")
    for _ in range(2):  # a new process, the second time
        with pytest.raises(error, match=words) as caught:
            built(builder, (graph, spec))
        assert "\n" not in str(caught.value)
        assert not scratch.exists()


def test_a_process_that_cannot_be_started_is_a_line(
    builder: Builder, make_decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    opened = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(MissingRequirementError, match="Cannot allocate memory"):
        built(builder, make_decoder())
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_request_that_cannot_be_read_is_a_line(
    builder: Builder, library: Library, make_decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the package was replaced meanwhile, by one in which a class has another name."""
    library("")
    graph, spec = make_decoder()

    class Renamed(GraphSpec):
        pass

    monkeypatch.setattr(sys.modules[__name__], "Renamed", Renamed, raising=False)
    Renamed.__qualname__, Renamed.__module__ = "Renamed", __name__
    renamed = Renamed.model_validate(spec.model_dump())
    with pytest.raises(EngineError, match=r"exit code 1\), and printed last: .*Error"):
        built(builder, (graph, renamed))


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("raise RuntimeError('a bug')", RuntimeError, "a bug"),
        ("class Own(Exception): pass\nraise Own('of its own')", Exception, "of its own"),
        (
            "class Own(Exception):\n    def __init__(self, *, name): super().__init__(name)\nraise Own(name='worse')",
            RuntimeError,
            "Own: worse",
        ),
    ],
)
def test_a_bug_is_shown_where_it_is(
    code: str, error: type[Exception], words: str, builder: Builder, library: Library, make_decoder: Any
) -> None:
    library(code)
    with pytest.raises(error, match=words) as caught:
        built(builder, make_decoder())
    assert "tensorrt_rtx.py" in "".join(caught.value.__notes__)


def test_what_a_library_prints_is_no_answer(builder: Builder, library: Library, make_decoder: Any) -> None:
    library("import os; print('banner', flush=True); os.write(1, b'from C'); raise ImportError('no GPU')")
    with pytest.raises(MissingRequirementError, match="does not load: no GPU"):
        built(builder, make_decoder())


def test_modules_are_found_as_they_are_here(
    builder: Builder, library: Library, make_decoder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the working folder too, as where Python was started in a checkout."""
    library("raise ImportError('the one beside it')")
    monkeypatch.setattr(sys, "path", [""] + [each for each in sys.path if each != str(tmp_path / "modules")])
    monkeypatch.chdir(tmp_path / "modules")
    with pytest.raises(MissingRequirementError, match="the one beside it"):
        built(builder, make_decoder())


def test_a_library_that_is_not_there(builder: Builder, library: Library, make_decoder: Any) -> None:
    library("raise ModuleNotFoundError('no such module')")
    with pytest.raises(MissingRequirementError, match="TensorRT-RTX is not installed"):
        built(builder, make_decoder())


def test_it_ends_when_nobody_waits_for_it(library: Library, make_decoder: Any, tmp_path: Path) -> None:
    """As when the command is killed: in the middle of an engine, too."""
    began = tmp_path / "began"
    library(
        f"import os, pathlib, time; pathlib.Path({str(began)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    graph, spec = make_decoder()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "modules")!r})
from pathlib import Path
from gap_export.bundle.spec import GraphSpec
from gap_export.engine.isolated import Builder
spec = GraphSpec.model_validate_json(Path({str(tmp_path / "spec.json")!r}).read_text())
Builder().engine_from_graph(
    Path({str(graph)!r}), spec, target="tensorrt-rtx", compute_capabilities=(), folder=Path({str(tmp_path)!r})
)
"""
    command = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: began.exists() and began.read_text() != "")
    command.kill()
    command.wait()
    until(lambda: not runs(int(began.read_text())))


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or ") Z" not in state.read_text()


def until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it never is"
        time.sleep(0.02)


def test_ctrl_c_in_the_terminal_is_the_commands(
    builder: Builder, library: Library, make_decoder: Any
) -> None:
    library("import os, signal; os.kill(os.getpid(), signal.SIGINT); raise ImportError('still there')")
    with pytest.raises(MissingRequirementError, match="still there"):
        built(builder, make_decoder())
    assert os.getpgid(process_of(builder).pid) != os.getpgid(0)
