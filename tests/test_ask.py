"""`gap-export ask`: one question, a conversation on a terminal and from standard input, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export import cli
from gap_export.bundle.folder import Bundle
from gap_export.cli.replies import interrupts_noted
from gap_export.pipeline.build import build
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.model import Model, load
from tests.test_cli import Result, refused

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER : ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT : ' + message['content'][0]['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
)
QUESTION = "where is the red mug ?"
LONGEST = 30
"""Tokens of an answer; of the tiny model's own most are that long."""

Ask = Callable[..., Result]


@pytest.fixture(scope="session")
def spoken(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("spoken") / "checkpoint"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def talking(
    spoken: Path, tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tracer: Any
) -> Bundle:
    """A bundle of it, with space for some turns. Not to be changed."""
    options = {**tiny_options, "checkpoint": str(spoken), "max_text": 150, "max_new_tokens": LONGEST}
    return build(
        Recipe.model_validate(options),
        tmp_path_factory.mktemp("talking") / "bundle",
        golden=False,
        tracer=tracer,
    ).bundle


@pytest.fixture
def model(talking: Bundle) -> Iterator[Model]:
    """The same model in Python, to compare with."""
    with load(talking, threads=1) as opened:
        yield opened


@pytest.fixture
def ask(talking: Bundle, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask("question", "--image", ..., lines=b"...")` as a user would type it, in this process."""

    def run(*arguments: str | Path, lines: bytes = b"", bundle: Path | None = None) -> Result:
        words = ["gap-export", "ask", str(bundle or talking.folder), *map(str, arguments), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, out, err)

    return run


@pytest.fixture
def second_image(tmp_path: Path) -> Path:
    """Another image than `image_file`, of another size."""
    path = tmp_path / "second.png"
    noise = np.random.default_rng(5).integers(0, 256, (30, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def records(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def record(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    (one,) = records(result)
    return one


# One question


def test_an_answer_is_that_of_python(ask: Ask, model: Model, image_file: Path) -> None:
    reply = model.ask(QUESTION, image_file)
    shown = ask(QUESTION, "--image", image_file)
    assert (shown.code, shown.out) == (0, reply.text + "\n")
    found = record(ask(QUESTION, "--image", image_file, "--json"))
    assert found == {
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "new_tokens": reply.new_tokens,
        "prompt_tokens": reply.prompt_tokens,
        "boxes": [],
        "visual_tokens": 36,
        "kept": 9,
        "kept_indices": reply.kept_indices.tolist(),
        "image_size": [48, 40],
        "notes": [],
        "backend": "onnxruntime",
    }


def test_an_answer_that_was_cut_off_says_so(ask: Ask, image_file: Path) -> None:
    shown = ask(QUESTION, "--image", image_file, "--max-new-tokens", "2")
    assert shown.code == 0
    assert "the answer was cut off after 2 tokens" in shown.err
    found = record(ask(QUESTION, "--image", image_file, "--max-new-tokens", "2", "--json"))
    assert (found["finish_reason"], found["new_tokens"]) == ("length", 2)


def test_text_alone(ask: Ask, model: Model) -> None:
    found = record(ask(QUESTION, "--no-image", "--json"))
    assert found["answer"] == model.ask(QUESTION).text
    assert (found["visual_tokens"], found["kept"], found["kept_indices"], found["image_size"]) == (
        0,
        0,
        [],
        None,
    )


def test_the_system_prompt_is_part_of_it(ask: Ask, image_file: Path) -> None:
    without = record(ask(QUESTION, "--image", image_file, "--json"))
    having = record(ask(QUESTION, "--image", image_file, "--json", "--system", "the small blue circle"))
    assert having["prompt_tokens"] == without["prompt_tokens"] + 4
    assert having["answer"] != without["answer"]


def test_a_stop_string_ends_it(ask: Ask, image_file: Path) -> None:
    whole = ask(QUESTION, "--image", image_file).out.strip()
    word = whole.split()[2]
    short = record(ask(QUESTION, "--image", image_file, "--json", "--stop", "zebra", "--stop", word))
    assert short["finish_reason"] == "stop"
    assert short["answer"] == whole[: whole.index(word)]


def test_neutral_sampling_is_greedy_and_a_seed_is_a_draw(ask: Ask, image_file: Path) -> None:
    greedy = ask(QUESTION, "--image", image_file).out
    neutral = [
        "--temperature",
        "0",
        "--top-p",
        "1",
        "--top-k",
        "0",
        "--min-p",
        "0",
        "--repetition-penalty",
        "1",
        "--seed",
        "7",
    ]
    assert ask(QUESTION, "--image", image_file, *neutral).out == greedy
    narrow = ["--temperature", "2", "--top-k", "1"]
    assert ask(QUESTION, "--image", image_file, *narrow).out == greedy
    hot = ["--image", image_file, "--temperature", "2"]
    drawn = {ask(QUESTION, *hot, "--seed", seed).out for seed in ("1", "2", "3")}
    assert len(drawn) > 1
    assert ask(QUESTION, *hot, "--seed", "1").out in drawn


def test_pieces_make_up_the_answer(
    ask: Ask, model: Model, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    written = cli.replies.out.write_piece
    monkeypatch.setattr(cli.replies.out, "write_piece", lambda text: (pieces.append(text), written(text)))
    whole = ask(QUESTION, "--image", image_file, "--no-stream").out
    assert pieces == [whole]
    pieces.clear()
    assert ask(QUESTION, "--image", image_file, "--stream").out == whole
    assert pieces[-1] == "\n"
    assert len(pieces) > 5
    assert whole == model.ask(QUESTION, image_file).text + "\n"


def test_several_images_in_any_bundle(ask: Ask, model: Model, image_file: Path, second_image: Path) -> None:
    found = record(ask(QUESTION, "--image", image_file, "--image", second_image, "--json"))
    assert found["answer"] == model.ask(QUESTION, [image_file, second_image]).text
    assert found["image_size"] == [64, 30]
    turned = record(ask(QUESTION, "--image", second_image, "--image", image_file, "--json"))
    assert turned["answer"] != found["answer"]


def test_every_box_is_drawn(
    ask: Ask, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(name: str, *boxes: tuple[float, ...]) -> np.ndarray:
        monkeypatch.setattr(ChatPrompts, "boxes_in", lambda *_: boxes)
        path = tmp_path / name
        found = record(ask(QUESTION, "--image", image_file, "--json", "--draw", path))
        assert found["boxes"] == [list(box) for box in boxes]
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[:500]  # without the caption

    one, other = (4.0, 4.0, 20.0, 20.0), (25.0, 10.0, 44.0, 36.0)
    none, first, both = drawn("none.png"), drawn("first.png", one), drawn("both.png", one, other)
    changed = (first != none).any(-1)
    assert changed.any()
    assert ((both != none).any(-1) & ~changed).sum() > changed.sum() // 2
    assert (both[changed] == first[changed]).all()
    shown = ask(QUESTION, "--image", image_file, "--draw", tmp_path / "none.png")
    assert "2 boxes [4.0, 4.0, 20.0, 20.0], [25.0, 10.0, 44.0, 36.0] in pixels of 48 x 40" in shown.err
    assert "drawn to" in shown.err


def test_a_reader_that_has_gone_is_lost_output(
    ask: Ask, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        result = ask(QUESTION, "--image", image_file, "--stream")
        monkeypatch.undo()
    assert result.code == 2
    assert result.err.startswith("output: standard output: cannot be written")
    assert result.err.count("\n") == 2


def test_ctrl_c_in_one_question_is_130(ask: Ask, image_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = cli.replies.out.write_piece

    def interrupted(text: str) -> None:
        written(text)
        if text != "\n":
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.replies.out, "write_piece", interrupted)
    result = ask(QUESTION, "--image", image_file, "--stream")
    assert result.code == 130
    assert result.out.endswith("\n")
    assert "Traceback" not in result.err


# Conversations from standard input


def test_every_line_is_a_turn(ask: Ask, model: Model, image_file: Path, second_image: Path) -> None:
    lines = f"{QUESTION}\n\n/image {second_image}\nwhat is above ?\n/nothing\n//new\n/new\n{QUESTION}\n/quit\nnever\n"
    result = ask("--image", image_file, "--json", lines=lines.encode())
    chat = model.chat(image_file)
    expected = [chat.ask(QUESTION), chat.ask("what is above ?", images=second_image), chat.ask("/new")]
    expected.append(expected[0])
    found = records(result)
    assert [each["answer"] for each in found] == [each.text for each in expected]
    assert [each["prompt_tokens"] for each in found] == [each.prompt_tokens for each in expected]
    assert [each["image_size"] for each in found] == [[48, 40], [64, 30], [64, 30], [48, 40]]
    first, *rest = result.err.splitlines()
    assert first.startswith("input: /nothing: is no command (commands are /image PATH")
    assert rest[0].startswith("input: 1 line of standard input: could not be used")
    assert result.code == 2


def test_lines_that_are_all_answered_are_a_success(ask: Ask, image_file: Path) -> None:
    result = ask("--image", image_file, lines=f"\ufeff{QUESTION}\nwhat is below ?".encode())
    assert result.code == 0
    assert result.out.count("\n") == 2
    again = ask("--image", image_file, "--stream", lines=f"{QUESTION}\r\nwhat is below ?\r\n".encode())
    assert (again.code, again.out) == (0, result.out)


def test_what_an_error_leaves_is_asked_with_the_next_question(
    ask: Ask, model: Model, image_file: Path, second_image: Path
) -> None:
    too_long = "the red mug " * 80
    lines = f"/image {second_image}\n{too_long}\n/image {image_file}x\n/image\n/focus\n{QUESTION}\n"
    result = ask("--image", image_file, "--json", lines=lines.encode())
    (found,) = records(result)
    assert found["answer"] == model.ask(QUESTION, [image_file, second_image]).text
    assert result.code == 2
    said = result.err.splitlines()
    assert len(said) == 6
    assert all(line.startswith("input: ") for line in said[:5])
    assert "4 lines of standard input" in said[4]


@pytest.mark.long
def test_focus_chooses_visual_tokens_anew(
    ask: Ask,
    spoken: Path,
    tiny_options: dict[str, Any],
    image_file: Path,
    tmp_path: Path,
    tracer: Any,
) -> None:
    options = {**tiny_options, "checkpoint": str(spoken), "max_text": 80, "pruner": "text_similarity"}
    bundle = build(Recipe.model_validate(options), tmp_path / "bundle", golden=False, tracer=tracer).bundle
    lines = f"{QUESTION}\nwhat is above ?\n/focus {'blue ' * 20}\n/focus a cat\nwhat is above ?\n/new\n{QUESTION}\n"
    result = ask("--image", image_file, "--json", lines=lines.encode(), bundle=bundle.folder)
    first, second, third, again = records(result)
    assert first["kept_indices"] == second["kept_indices"] == again["kept_indices"] != third["kept_indices"]
    assert (first["notes"], third["notes"], again["answer"]) == ([], [], first["answer"])
    assert "by an earlier question" in second["notes"][0]
    assert result.code == 2  # twenty words are more than the text tower reads
    assert "text tower, which reads 12" in result.err
    with load(bundle, threads=1) as opened:
        chat = opened.chat(image_file)
        chat.ask(QUESTION), chat.ask("what is above ?")
        assert chat.ask("what is above ?", focus="a cat").text == third["answer"]
    focused = record(ask(QUESTION, "--image", image_file, "--json", "--focus", "a cat", bundle=bundle.folder))
    assert focused["kept_indices"] == third["kept_indices"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b"", "has no question"),
        (b"\n \n/new\n", "has no question"),
        (b"what\xff\n", "line 1 of standard input: is not valid text"),
        (b"x" * 5_000_000, "line 1 of standard input: has more than 4000000 bytes"),
        (b"a\0b\n", "NUL"),
        (b"/focus red\n", "focus, pruner cls_attention: has no effect"),
        (b"/Image x\n", "/Image: is no command"),
        (b"/new x\n", "/new: is no command"),
    ],
)
def test_lines_that_cannot_be_used(lines: bytes, words: str, ask: Ask, image_file: Path) -> None:
    refused(ask("--image", image_file, lines=lines), words)


def test_without_standard_input(ask: Ask, image_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.dialogue, "_lines_of_terminal", None)

    def closed(*_: Any) -> None:
        sys.stdin = None  # type: ignore[assignment]

    monkeypatch.setattr(cli.streams, "check_surroundings", closed)
    refused(ask("--image", image_file), "has no question")


# On a terminal

SLOW = """
import sys, time
from gap_export.runtime.conversation import cache as conversation_cache
step = conversation_cache.ConversationCache.step
def slow(self, id_):
    time.sleep(0.1)
    return step(self, id_)
conversation_cache.ConversationCache.step = slow
from gap_export import cli
cli.main()
"""


class Typist:
    """`gap-export ask` on a terminal of its own, every step of its decoder a tenth of a second long."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a shell leaves it
            os.environ.update(OMP_NUM_THREADS="1", TERM="dumb", COLUMNS="200")
            os.execv(sys.executable, [sys.executable, "-c", SLOW, "ask", *arguments, "--threads", "1"])
        self.shown, self.is_running = "", True

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, holds: Callable[[str], bool], seconds: float = 60) -> str:
        """What was shown since the last time, when it holds."""
        deadline = time.monotonic() + seconds
        while not holds(self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._terminal, 4096).decode()
                except OSError:  # it has ended
                    assert holds(self.shown), self.shown
        shown, self.shown = self.shown, ""
        return shown

    def code(self, typed: str) -> int:
        """Exit code, when it has ended by what is typed: until then again every second, as a key may come before it is waited for."""
        for _ in range(30):
            self.type(typed)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                if select.select([self._terminal], [], [], 0.05)[0]:
                    try:
                        self.shown += os.read(self._terminal, 4096).decode()
                    except OSError:  # it has ended
                        return self._ended()
        raise AssertionError(self.shown)

    def _ended(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.is_running = False
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)


def prompted(shown: str) -> bool:
    return shown.endswith("> ")


@pytest.fixture
def typist(talking: Bundle, image_file: Path) -> Iterator[Callable[..., Typist]]:
    started: list[Typist] = []

    def start(*arguments: str) -> Typist:
        started.append(Typist(str(talking.folder), "--image", str(image_file), *arguments))
        return started[-1]

    yield start
    for each in started:
        if each.is_running:
            os.kill(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)


def test_a_conversation_on_a_terminal(typist: Callable[..., Typist], model: Model, image_file: Path) -> None:
    chat = model.chat(image_file)
    person = typist()
    assert "Ctrl-D ends" in person.wait_for(prompted)
    person.type(f"{QUESTION}\n")
    whole = chat.ask(QUESTION).text
    assert whole in person.wait_for(prompted)
    person.type("/picture\n")
    assert "input: /picture: is no command" in person.wait_for(prompted)

    person.type("what is above ?\n")
    person.wait_for(lambda shown: len(shown.partition("?")[2].split()) >= 3)  # in the middle of an answer
    person.type("\x03")
    said = person.wait_for(prompted)
    assert "the answer was ended after" in said
    number = int(said.partition("ended after ")[2].split()[0])
    assert 2 < number < LONGEST
    cut = chat.ask("what is above ?", max_new_tokens=number)

    person.type("where is it ?\n")
    assert chat.ask("where is it ?").text in person.wait_for(prompted)
    assert cut.finish_reason == "length"
    assert person.code("\x04") == 0
    assert "Traceback" not in person.shown


@pytest.mark.parametrize(("typed", "code"), [("\n", 0), ("/quit\n", 0), ("\x03", 130)])
def test_how_a_conversation_ends(typed: str, code: int, typist: Callable[..., Typist]) -> None:
    person = typist()
    person.wait_for(prompted)
    assert person.code(typed) == code
    assert "Traceback" not in person.shown


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_ends_the_program() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_noted() as noted:
        assert not noted()
        signal.raise_signal(signal.SIGINT)
        assert noted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_noted() as noted:
            signal.raise_signal(signal.SIGINT)
            assert not noted()
    finally:
        signal.signal(signal.SIGINT, before)


# What is refused


def test_images_are_said_to_be_there_or_not(ask: Ask, image_file: Path, tmp_path: Path) -> None:
    refused(ask(QUESTION), "an image: is not given", "--no-image for text alone")
    refused(ask(QUESTION, "--image", image_file, "--no-image"), "--no-image: stands beside --image")
    refused(ask(QUESTION, "--image", tmp_path / "none.png"), "none.png")
    refused(ask(QUESTION, "--image", tmp_path), str(tmp_path))
    refused(ask(QUESTION, "--no-image", "--draw", tmp_path / "x.png"), "has no image to draw on")
    refused(ask("--image", image_file, "--draw", tmp_path / "x.png"), "belongs to one question")
    refused(ask(QUESTION, "--image", image_file, "--draw", tmp_path / "x.unknown"), "x.unknown")
    refused(ask(QUESTION, "--image", image_file, "--stream", "--json"), "stands beside --stream")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        ("", [], "is empty"),
        (" \t", [], "the question: is empty"),
        ("a\0b", [], "the question: contains a NUL"),
        ("a\ud800", [], "the question: is not valid text"),
        (QUESTION, ["--system", "\n"], "the system prompt: is empty"),
        (QUESTION, ["--system", "\udcff"], "the system prompt: is not valid text"),
        (QUESTION, ["--focus", "the mug"], "focus, pruner cls_attention: has no effect"),
        (QUESTION, ["--max-new-tokens", "0"], "--max-new-tokens"),
        (QUESTION, ["--max-new-tokens", "9000"], "9000 new tokens needs"),
        (QUESTION, ["--temperature", "-1"], "a number from 0 to 100"),
        (QUESTION, ["--temperature", "nan"], "a number from 0 to 100"),
        (QUESTION, ["--temperature", "inf"], "a number from 0 to 100"),
        (QUESTION, ["--top-p", "0"], "a number above 0 and at most 1"),
        (QUESTION, ["--top-k", "-1"], "--top-k"),
        (QUESTION, ["--min-p", "2"], "a number from 0 to 1"),
        (QUESTION, ["--repetition-penalty", "0"], "a number above 0"),
        (QUESTION, ["--seed", "-1"], "--seed"),
        (QUESTION, ["--stop", "x"] * 101, "101 stop strings: are more than 100"),
        (QUESTION, ["--stop", "x" * 2000], "has 2000 characters"),
        (QUESTION, ["--backend", "tflite"], "tflite"),
        (QUESTION, ["--keep", "0.5"], "keep"),
        (QUESTION, ["--box-format", "lava"], "did you mean 'llava'"),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "backslashreplace").decode() if value else "none",
)
def test_what_cannot_be_asked(
    question: str, options: list[str], words: str, ask: Ask, image_file: Path
) -> None:
    result = ask(question, "--image", image_file, *options)
    refused(result, words)
    assert result.err.count("\n") == 2


def test_a_question_that_does_not_fit_says_by_how_much(ask: Ask, talking: Bundle, image_file: Path) -> None:
    result = ask("red " * 500, "--image", image_file)
    refused(result, f"a cache of {talking.manifest.capacity}", "505 text tokens and 9 visual tokens")


def test_a_bundle_without_a_template_answers_no_questions(
    ask: Ask, talking: Bundle, image_file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(talking.folder, tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["chat"] = None
    del manifest["files"]["chat_template.jinja"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(ask(QUESTION, "--image", image_file, bundle=folder), "answers no free questions")
