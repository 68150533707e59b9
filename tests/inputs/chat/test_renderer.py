"""A hostile chat template ends in one sentence, and takes neither time nor memory, nor the process that renders the next conversation."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gap_export
from gap_export.errors import InputError, MissingRequirementError
from gap_export.inputs.chat import child, renderer
from gap_export.inputs.chat.limits import Limits
from gap_export.inputs.chat.renderer import Renderer

SMALL = Limits(seconds=0.25, memory_bytes=96 * 2**20, characters=10_000)
UNHURRIED = SMALL.model_copy(update={"seconds": 20.0})
"""For what must end by another limit than that of time, on machines that do much else."""

ENDLESS = {
    "loops within loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a loop that is filtered away": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "macros that call two": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ (messages | length + 9) ** (10 ** 8) > 3 }}",
    "a slow replacement": "{% for a in range(99999) %}{% if (a ~ 'ab' * 99999) | replace('a', 'c') | length == 1 %}{% endif %}{% endfor %}",
}
HOSTILE = {
    "a huge text": ("{{ messages[0].content * 10 ** 12 }}", "MiB of memory"),
    "a huge constant": ("{{ 'a' * 10 ** 12 }}", "MiB of memory"),
    "a huge list": ("{% set all = [messages] * 10 ** 9 %}", "MiB of memory"),
    "a text that doubles": ("{% set ns = namespace(t='ab') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}", "MiB of memory"),
    "a block that is kept": ("{% set t %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}", "MiB of memory"),
    "a wide number": ("{{ '%99999999999d' | format(1) }}", "MiB of memory"),
    "a wide field": ("{{ '{:9999999999}'.format(1) }}", "MiB of memory"),
    "a wide centre": ("{{ 'a' | center(10 ** 10) }}", "MiB of memory"),
    "wide indents": ("{{ ('a\\n' * 9999) | indent(10 ** 7) }}", "MiB of memory"),
    "huge JSON": ("{{ messages | tojson(indent=10 ** 9) }}", "MiB of memory"),
    "a wide range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "a long text, in pieces": ("{% for i in range(99999) %}{{ i }}{% endfor %}", "more than 10000 characters"),
    "a long text, at once": ("{{ 'a' * 10001 }}", "more than 10000 characters"),
    "words without meaning": ("{{ lipsum(n=20, html=false) * 9 }}", "more than 10000 characters"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' of 'str' object is unsafe"),
    "classes, by a filter": ("{{ (''|attr('__class__')).mro() }}", "unsafe"),
    "classes, by a format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
    "classes, by a mapping": ("{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}", "unsafe"),
    "globals of a function": ("{{ raise_exception.__globals__.keys() }}", "unsafe"),
    "modules of a function": ("{{ lipsum.__globals__['os'].popen('id').read() }}", "unsafe"),
    "the environment": ("{{ self._TemplateReference__context.environment }}", "unsafe"),
    "the class of dict": ("{{ dict.mro() }}", "has no attribute 'mro'"),
    "a hidden attribute": ("{% set ns = namespace(__class__=1) %}", "cannot have the attribute '__class__'"),
    "a hidden attribute, later": ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "cannot have the attribute '__class__'"),
    "messages that are changed": ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
    "a message that is changed": ("{{ messages[0].update(role='system') }}", "'update' of 'dict' object is unsafe"),
    "a file that is included": ("{% include '/etc/passwd' %}", "asks for another template in line 1"),
    "a file that may be missing": ("{% include 'no' ignore missing %}", "asks for another template"),
    "a file that is imported": ("\n{% import 'chat_template.jinja' as other %}", "asks for another template in line 2"),
    "a file that is extended": ("{% extends '../base.jinja' %}", "asks for another template"),
    "a file that is opened": ("{{ open('/etc/passwd') }}", "'open' is undefined"),
    "a module that is imported": ("{{ __import__('os') }}", "'__import__' is undefined"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    "a loop that calls itself": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "nested too deeply"),
    "deep parentheses": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "nested too deeply"),
    "deep loops": ("{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "too many statically nested blocks"),
    "half a surrogate pair": ("{{ 'a\\ud800' }}", "half of a surrogate pair ('\\ud800')"),
    "a NUL": ("a{{ '\\x00' }}", "a NUL character"),
    "refusal in several lines": ("{{ raise_exception('no\n\x1b[31mway') }}", "refuses the conversation: no\\n\\x1b[31mway ("),
    "refusal that is long": ("{{ raise_exception('a' * 10 ** 6) }}", "aaa ... ("),
    "refusal without words": ("{{ raise_exception(nothing) }}", "refuses the conversation:  ("),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "what is not there": ("\n\n{{ messages[0].a.b }}", "is not given in line 3: 'dict object' has no attribute 'a'"),
    "a fragment": ("ok\n{% if messages %}", "not valid Jinja in line 2: Unexpected end of template"),
    "an unknown tag": ("\n\n{% shell 'id' %}", "in line 3: Encountered unknown tag 'shell'"),
    "an unknown filter": ("{{ 1 | shell }}", "No filter named 'shell'"),
    "a break alone": ("{% break %}", "outside loop"),
    "generation without end": ("{% generation %}", "not valid Jinja in line 1"),
    "Python": ("{{ [a for a in messages] }}", "not valid Jinja in line 1"),
    "JSON of nothing": ("{{ nothing | tojson }}", "Undefined is not JSON serializable"),
}  # fmt: skip
"""Template -> a part of what is said of it."""

GOOD = [{"role": "user", "content": "good"}]
BAD = [{"role": "user", "content": "bad"}]


def after_a_good_one(template: str) -> str:
    """One that is hostile for one of two conversations, if it can be read at all."""
    return f"{{% if messages[0].content == 'good' %}}fine{{% else %}}{template}{{% endif %}}"


def check_one_line(error: Exception) -> None:
    said = str(error)
    assert said.isprintable(), said
    assert len(said) < 700
    assert "Traceback" not in said


ALONE = {
    "a file that is extended",
    "deep parentheses",
    "deep loops",
    "a break alone",
    "generation without end",
    "Python",
} | {
    name
    for name in HOSTILE
    if name.startswith("an unknown") or "\n" in HOSTILE[name][0] or "macro" in HOSTILE[name][0]
}
"""What cannot be one of several things that a template does: it cannot be read, for one, or the line of its error is counted."""


@pytest.fixture(scope="module")
def everything() -> Iterator[Renderer]:
    """A template that is fine for one conversation, and hostile as the others name it."""
    cases = (
        f"{{% elif messages[0].content == {name!r} %}}{template}"
        for name, (template, _) in HOSTILE.items()
        if name not in ALONE
    )
    template = f"{{% if messages[0].content == 'good' %}}fine{''.join(cases)}{{% endif %}}"
    with Renderer(template, limits=UNHURRIED) as rendering:
        yield rendering


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_end(name: str) -> None:
    with Renderer(after_a_good_one(ENDLESS[name]), limits=SMALL) as rendering:
        with pytest.raises(InputError, match=r"took more than 0\.25 s") as refused:
            rendering.render(BAD)
        check_one_line(refused.value)
        assert rendering.render(GOOD) == "fine"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ALONE])
def test_the_next_conversation_is_rendered(everything: Renderer, name: str) -> None:
    with pytest.raises(InputError) as refused:
        everything.render([{"role": "user", "content": name}])
    assert HOSTILE[name][1] in str(refused.value)
    assert refused.value.subject == "chat template"
    check_one_line(refused.value)
    assert everything.render(GOOD) == "fine"


@pytest.mark.parametrize("name", sorted(ALONE))
def test_hostile_templates(name: str) -> None:
    template, said = HOSTILE[name]
    with Renderer(template, limits=UNHURRIED) as rendering:
        for _ in range(2):
            with pytest.raises(InputError) as refused:
                rendering.render(BAD)
            assert said in str(refused.value)
            check_one_line(refused.value)


def test_a_template_that_is_too_long() -> None:
    with pytest.raises(InputError, match="has 11 characters, and may have 10"):
        Renderer("a" * 11, limits=Limits(template_characters=10))
    with Renderer("a" * 10, limits=Limits(template_characters=10, characters=10)) as rendering:
        assert rendering.render([]) == "a" * 10


@pytest.mark.parametrize(
    "given", [{"seconds": 0}, {"seconds": 1e9}, {"memory_bytes": 1}, {"characters": 0}, {"hours": 1}]
)
def test_limits_have_limits(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Limits(**given)


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize("value", [object(), b"bytes", {(1, 2): 3}, circle()])
def test_what_is_not_of_jsons_types(value: Any) -> None:
    with pytest.raises(InputError, match="cannot be given its variables") as refused:
        Renderer("", {"x": value})
    check_one_line(refused.value)
    with Renderer("fine") as rendering:
        with pytest.raises(InputError, match="cannot be given the conversation"):
            rendering.render([{"role": "user", "content": value}])
        assert rendering.render(GOOD) == "fine"


def test_a_conversation_that_is_too_large_for_the_process() -> None:
    limits = Limits(memory_bytes=SMALL.memory_bytes)
    with Renderer("{{ messages | length }}", limits=limits) as rendering:
        with pytest.raises(InputError, match="took more than 96 MiB of memory"):
            rendering.render([{"role": "user", "content": "a" * 5 * 10**7}])
        assert rendering.render(GOOD) == "1"


def test_long_texts_both_ways() -> None:
    text = "é\n😀" * 100_000
    with Renderer("{{ messages[0].content }}") as rendering:
        assert rendering.render([{"role": "user", "content": text}]) == text
        assert rendering.render_all([([{"content": text + str(i)}], False) for i in range(3)]) == [
            text + str(i) for i in range(3)
        ]
        assert rendering.render_all([]) == []


# ------------------------------------------------------------------------------------------------------------
# The process


def process_of(rendering: Renderer) -> subprocess.Popen[bytes]:
    assert rendering._process is not None
    return rendering._process._process


def test_no_process_before_the_first_use_and_none_after_the_last() -> None:
    rendering = Renderer("fine")
    assert rendering._process is None
    rendering.close()
    rendering.render(GOOD)
    first = process_of(rendering)
    rendering.render(GOOD)
    assert process_of(rendering) is first
    rendering.close()
    rendering.close()
    assert first.returncode is not None
    assert rendering.render(GOOD) == "fine"
    second = process_of(rendering)
    del rendering
    gc.collect()
    assert second.returncode is not None


def test_a_process_that_was_killed_is_said_and_replaced() -> None:
    with Renderer("fine") as rendering:
        rendering.render(GOOD)
        process_of(rendering).kill()
        with pytest.raises(InputError, match="ended the process that renders it: signal 9"):
            rendering.render(GOOD)
        assert rendering.render(GOOD) == "fine"


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (child.frame([1]), "answer that is none"),
        (child.frame({"texts": ["a", "b"]}), "answer that is none"),
        (child.frame({"texts": [1]}), "answer that is none"),
        (child.frame({"kind": ["raised"]}), "answer that is none"),
        (child.frame({"kind": "raised", "line": "x", "said": [1, "\n"]}), "refuses the conversation"),
        (b"\xff" * 100, "answer that is none"),
        ((2).to_bytes(8, "big") + b"[[", "answer that is none"),
        (b"\0\0\0", "ended the process"),
    ],
)
def test_a_process_that_was_taken_over(monkeypatch: pytest.MonkeyPatch, sent: bytes, said: str) -> None:
    """What a template would send that found a way out of its sandbox."""
    program = f"import os, sys; os.write(1, {child.frame({})!r} + {sent!r}); sys.stdin.buffer.read(9)"
    monkeypatch.setattr(renderer, "_START", program)
    with Renderer("fine") as rendering:
        with pytest.raises(InputError, match=said) as refused:
            rendering.render(GOOD)
        check_one_line(refused.value)
        monkeypatch.undo()
        rendering.close()
        assert rendering.render(GOOD) == "fine"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("import sys; sys.path += sys.argv[1:]; sys.modules['jinja2'] = None; from gap_export.inputs.chat import child; child.main()", "jinja2"),
        ("import time; time.sleep(100)", "not ready after 0.2 s"),
    ],
)  # fmt: skip
def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    monkeypatch.setattr(renderer, "_START", program)
    if "sleep" in program:
        monkeypatch.setattr(renderer, "_START_SECONDS", 0.2)
    with Renderer("fine") as rendering:
        with pytest.raises(MissingRequirementError, match=said) as refused:
            rendering.render(GOOD)
        check_one_line(refused.value)
        assert rendering._process is None


@pytest.mark.parametrize("python", ["/does/not/exist", "", "/dev/null"])
def test_an_interpreter_that_does_not_run(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(MissingRequirementError, match="cannot be started: ") as refused:
        Renderer("fine").render(GOOD)
    check_one_line(refused.value)


def test_without_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        MissingRequirementError, match="jinja2: is needed for chat templates and not installed"
    ):
        Renderer("fine").render(GOOD)


def test_threads_share_a_renderer() -> None:
    found: dict[int, list[str]] = {}
    with Renderer("{{ messages[0].content }}") as rendering:

        def work(number: int) -> None:
            found[number] = [rendering.render([{"content": f"{number}-{i}"}]) for i in range(50)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: [f"{number}-{i}" for i in range(50)] for number in range(4)}


def test_a_renderer_that_is_inherited() -> None:
    """A forked process starts one of its own, and leaves the other to its owner."""
    with Renderer("{{ messages[0].content }}") as rendering:
        rendering.render(GOOD)
        first = process_of(rendering)
        forked = os.fork()
        if forked == 0:
            good = False
            try:
                good = rendering.render(BAD) == "bad" and process_of(rendering).pid != first.pid
                rendering.close()
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
        assert rendering.render(GOOD) == "good"
        assert process_of(rendering) is first


def run(code: str, *arguments: str, **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, **given
    )


def test_this_process_imports_no_jinja_and_the_other_no_numpy() -> None:
    code = """
import sys
from gap_export.inputs.chat.renderer import Renderer
with Renderer("fine") as rendering:
    assert rendering.render([]) == "fine"
    maps = open(f"/proc/{rendering._process._process.pid}/maps").read()
assert "jinja2" not in sys.modules
assert "numpy" not in maps and "pydantic" not in maps and "tokenizers" not in maps
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_working_folder_that_is_not_there(tmp_path: Path) -> None:
    code = """
import os, sys
from gap_export.inputs.chat.renderer import Renderer
os.rmdir(os.getcwd())
print(Renderer("fine").render([]))
"""
    (tmp_path / "gone").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(gap_export.__file__).parents[1]), "LC_ALL": "C"}
    done = run(code, cwd=tmp_path / "gone", env=environment)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_modules_of_the_working_folder_are_not_imported(tmp_path: Path) -> None:
    for name in ("json", "jinja2", "resource"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    code = f"""
import os
from gap_export.inputs.chat.renderer import Renderer
os.environ["PYTHONPATH"] = {str(tmp_path)!r}
os.chdir({str(tmp_path)!r})
print(Renderer("fine").render([]))
"""
    done = run(code)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_a_package_in_an_archive(tmp_path: Path) -> None:
    """The package may lie in a zip file, in a folder whose name is not ASCII."""
    folder = tmp_path / "dossier été"
    folder.mkdir()
    root = Path(gap_export.__file__).parent
    with zipfile.ZipFile(folder / "package.zip", "w") as archive:
        for path in [
            *root.glob("*.py"),
            root / "inputs" / "__init__.py",
            *root.glob("inputs/chat/*.py"),
            *root.glob("files/*.py"),
        ]:
            archive.write(path, path.relative_to(root.parent))
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from gap_export.inputs.chat import child, renderer
assert "package.zip" in child.__file__
print(renderer.Renderer("fine").render([]))
"""
    done = run(code, str(folder / "package.zip"), cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def ends(pid: int) -> None:
    """Wait until a process that is no child of this one is no more than a name."""
    while (
        Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ):
        threading.Event().wait(0.01)


@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 9)", "raise KeyboardInterrupt"]
)
def test_the_process_ends_with_its_parent(end: str) -> None:
    code = f"""
import os, sys
from gap_export.inputs.chat.renderer import Renderer
rendering = Renderer("fine")
rendering.render([])
print(rendering._process._process.pid, flush=True)
{end}
"""
    done = run(code)
    ends(int(done.stdout))


def test_a_busy_process_ends_after_its_parent() -> None:
    code = """
import os, sys, threading
from gap_export.inputs.chat.limits import Limits
from gap_export.inputs.chat.renderer import Renderer
rendering = Renderer("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", limits=Limits(seconds=0.2))
rendering._started()
print(rendering._process._process.pid, flush=True)
threading.Timer(0.1, lambda: os._exit(0)).start()
rendering.render([])
"""
    done = run(code)
    ends(int(done.stdout))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_request_and_its_process() -> None:
    with Renderer(after_a_good_one(ENDLESS["loops within loops"])) as rendering:
        rendering.render(GOOD)
        busy = process_of(rendering)
        os.kill(busy.pid, signal.SIGINT)  # ignored there
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            rendering.render(BAD)
        timer.join()
        assert busy.returncode is not None
        assert rendering.render(GOOD) == "fine"


def test_the_process_limits_itself() -> None:
    resource = pytest.importorskip("resource")
    with Renderer("fine", limits=SMALL) as rendering:
        rendering.render(GOOD)
        pid = process_of(rendering).pid
        limit: Callable[[int], tuple[int, int]] = lambda kind: resource.prlimit(pid, kind)  # noqa: E731
        assert limit(resource.RLIMIT_AS)[0] == SMALL.memory_bytes
        assert limit(resource.RLIMIT_CORE)[0] == 0
        assert limit(resource.RLIMIT_FSIZE)[0] == 0
        assert 1 <= limit(resource.RLIMIT_CPU)[0] < 60
