"""The page at `/`, in a real browser against a real server: what is drawn is what the API says, with or without a mouse."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.runtime.model import load
from gap_export.serving.engine import Engine
from gap_export.serving.http.auth import Keys
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.limits import EngineLimits
from gap_export.serving.server import Server, ServerOptions, address_of, listen
from gap_export.serving.service import Service
from tests.browser import Tab, browser
from tests.serving.asking import scenes

pytestmark = [pytest.mark.slow, browser]

KEY = "a-key-of-this-test"
SIZE = (1200, 900)


@dataclass(frozen=True)
class Served:
    """A server, as its clients see it."""

    address: str
    engine: Engine

    def post(self, path: str, **body: Any) -> Any:
        done = httpx.post(f"{self.address}{path}", json=body, timeout=60)
        assert done.status_code == 200, done.text
        return done.json()


@contextmanager
def server_of(engine: Engine, settings: HttpSettings) -> Iterator[Served]:
    """A server in a thread, on a port of its own."""
    listening = listen(ServerOptions(port=0))
    server = Server(Service(engine, "shapes"), settings, ServerOptions())
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    served = Served(address_of(listening), engine)
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        try:
            if httpx.get(f"{served.address}/v1/health/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.02)
    yield served
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def engine(shapes_bundle: Bundle) -> Iterator[Engine]:
    with load(shapes_bundle, threads=1) as model, Engine(model, EngineLimits(rows=2)) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with server_of(engine, HttpSettings(allow_baselines=True)) as served:
        yield served


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with Tab(tmp_path_factory.mktemp("profile"), SIZE) as tab:
        yield tab


@pytest.fixture
def tab(window: Tab, served: Served) -> Tab:
    """The page, freshly loaded; nothing was complained about or asked of another host before."""
    window.requested.clear()
    window.complaints.clear()
    window.open(f"{served.address}/")
    window.until("document.getElementById('model').textContent.startsWith('shapes:')")
    return window


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    scenes(1)[0].image.save(path)
    return path


EXPRESSION = scenes(1)[0].expression
WORKS = "document.getElementById('answer').hasAttribute('aria-busy')"


def text_of(tab: Tab, name: str) -> str:
    return str(tab.run(f"document.getElementById({name!r}).textContent"))


def choose(tab: Tab, path: Path) -> None:
    tab.give_file("#file", path)
    tab.until(
        "document.getElementById('shown').complete && document.getElementById('shown').naturalWidth > 0"
    )


def write(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('text').focus()")
    tab.type(text)


def answered(tab: Tab) -> None:
    tab.until(f"!({WORKS}) && document.getElementById('said').textContent !== 'Nothing was asked yet.'")


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def drawn(tab: Tab) -> list[float]:
    """Edges of the box as it lies on the screen, in pixels of the image."""
    edges: list[float] = tab.run(
        """(() => { const image = document.getElementById('shown'), all = image.getBoundingClientRect();
        const box = document.querySelector('#overlay .box').getBoundingClientRect(), scale = image.naturalWidth / all.width;
        return [box.left - all.left, box.top - all.top, box.right - all.left, box.bottom - all.top].map(edge => edge * scale); })()"""
    )
    return edges


def test_the_box_and_the_patches_are_those_of_the_api(tab: Tab, served: Served, scene: Path) -> None:
    (said,) = served.post("/v1/ground", image=data_url(scene), expression=EXPRESSION, evidence=True)[
        "results"
    ]
    choose(tab, scene)
    write(tab, EXPRESSION)
    tab.press("Enter")
    answered(tab)
    assert text_of(tab, "error") == ""
    assert text_of(tab, "said") == said["raw"]
    assert all(
        abs(one - other) < 1 for one, other in zip(drawn(tab), said["boxes"][0]["pixels"], strict=True)
    )
    assert (
        tab.run("document.querySelector('#overlay .kept').dataset.count")
        == str(len(said["kept_indices"]))
        == "36"
    )
    cells = tab.run("document.querySelector('#overlay .kept').getAttribute('d')").count("M")
    assert cells == said["keep"]["tokens"]
    assert text_of(tab, "kept") == "36 of 144 visual tokens were kept; position ids: gap."
    for phase in ("image encoded", "prompt read", "answer made"):
        assert phase in text_of(tab, "phases")
    assert tab.run("document.querySelectorAll('#bar span').length") == 5
    assert f'"raw": "{said["raw"]}"' in text_of(tab, "json")
    patch = said["patches"]
    assert (patch["rows"], patch["columns"]) == (12, 12)
    index, (left, top, width, height) = said["kept_indices"][0], patch["area"]
    first = f"M{left + index % 12 * width / 12:g} {top + index // 12 * height / 12:g}h"
    assert tab.run("document.querySelector('#overlay .kept').getAttribute('d')").startswith(first)
    tab.run("document.getElementById('patches').click()")
    assert tab.run("getComputedStyle(document.querySelector('#overlay .pruned')).display") == "none"


def test_it_reaches_for_nothing_else(tab: Tab, served: Served, scene: Path) -> None:
    choose(tab, scene)
    write(tab, EXPRESSION)
    tab.press("Enter")
    answered(tab)
    assert f"{served.address}/page.js" in tab.requested
    assert all(each.startswith((served.address, "blob:", "data:")) for each in tab.requested)
    assert not tab.complaints
    headers = httpx.get(f"{served.address}/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["referrer-policy"] == "no-referrer"
    blocked = tab.run(
        """new Promise(done => { document.addEventListener('securitypolicyviolation', event => done(event.violatedDirective));
        const made = document.createElement('script'); made.textContent = 'window.injected = 1'; document.body.append(made); })"""
    )
    assert blocked.startswith("script-src")
    assert tab.run("window.injected === undefined")


def test_requests_choose_how_much_is_kept(tab: Tab, scene: Path) -> None:
    choose(tab, scene)
    assert tab.run("['min', 'max', 'value'].map(name => document.getElementById('keep')[name])") == [
        "0.1",
        "1",
        "0.25",
    ]
    tab.run("document.getElementById('keep').focus()")
    tab.press("ArrowRight")
    assert text_of(tab, "keep-shown") == "26 %"
    tab.press("End")
    assert tab.run("document.getElementById('keep').getAttribute('aria-valuetext')") == "100 % of 144"
    write(tab, EXPRESSION)
    tab.press("Enter")
    answered(tab)
    assert text_of(tab, "kept").startswith("144 of 144")


def test_answers_in_words_are_streamed(tab: Tab, served: Served, scene: Path) -> None:
    question = f"where is {EXPRESSION}?"
    choose(tab, scene)
    write(tab, question)
    tab.run(
        """window.seen = []; new MutationObserver(() => window.seen.push(document.getElementById('said').textContent))
        .observe(document.getElementById('said'), { childList: true, characterData: true, subtree: true })"""
    )
    tab.run("document.getElementById('ask').click()")
    answered(tab)
    content = [
        {"type": "image_url", "image_url": {"url": data_url(scene)}},
        {"type": "text", "text": question},
    ]
    whole = served.post(
        "/v1/chat/completions", model="shapes", messages=[{"role": "user", "content": content}]
    )
    assert text_of(tab, "said") == whole["choices"][0]["message"]["content"]
    assert len(tab.run("window.seen.filter(text => text && text !== 'Working ...')")) > 3
    pixels = whole["gap"]["boxes"][0]["pixels"]
    assert all(abs(one - other) < 1 for one, other in zip(drawn(tab), pixels, strict=True))


def test_the_switch_compares_with_renumbered_ids(tab: Tab, served: Served, scene: Path) -> None:
    assert not tab.run("document.getElementById('positions-row').hidden")
    choose(tab, scene)
    tab.run("document.querySelector('[value=shifted]').click()")
    write(tab, EXPRESSION)
    tab.press("Enter")
    answered(tab)
    asked = {"image": data_url(scene), "expression": EXPRESSION}
    (right,), (wrong,) = (
        served.post("/v1/ground", **asked, positions=positions)["results"] for positions in ("gap", "shifted")
    )
    assert text_of(tab, "said") == wrong["raw"] != right["raw"]
    assert text_of(tab, "kept").endswith("position ids: shifted.")


def test_boxes_lie_on_the_image_as_displayed(tab: Tab, served: Served, scene: Path, tmp_path: Path) -> None:
    """An image that its EXIF data turn: the browser turns it, and so does the server."""
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(scene).convert("RGB").resize((192, 96)).save(turned, exif=exif, quality=95)
    choose(tab, turned)
    assert tab.run(
        "[document.getElementById('shown').naturalWidth, document.getElementById('shown').naturalHeight]"
    ) == [96, 192]
    write(tab, EXPRESSION)
    tab.press("Enter")
    answered(tab)
    answer = served.post(
        "/v1/ground", image=data_url(turned).replace("png", "jpeg"), expression=EXPRESSION, evidence=True
    )
    assert answer["image"] == {"width": 96, "height": 192}
    assert tab.run("document.getElementById('overlay').getAttribute('viewBox')") == "0 0 96 192"
    assert answer["results"][0]["patches"]["area"] == [-48, 0, 192, 192], "padding lies beyond the image"
    for box in answer["results"][0]["boxes"]:
        assert all(abs(one - other) < 1 for one, other in zip(drawn(tab), box["pixels"], strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x89PNG\r\n\x1a\n" + b"no image" * 40, "image"), (None, "Choose an image first")],
)
def test_errors_are_said_in_words(tab: Tab, tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        path = tmp_path / "broken.png"
        path.write_bytes(content)
        tab.give_file("#file", path)
        tab.until("document.getElementById('error').textContent.includes('cannot show')")
    write(tab, "the red circle")
    tab.press("Enter")
    tab.until("document.getElementById('said').textContent === 'No answer.'")
    assert words in text_of(tab, "error")
    assert "{" not in text_of(tab, "error")
    assert tab.run("document.getElementById('error').getAttribute('role')") == "alert"
    tab.complaints.clear()  # of the status that was asked for


def test_an_answer_can_be_stopped(tab: Tab, served: Served, scene: Path) -> None:
    choose(tab, scene)
    write(tab, EXPRESSION)
    tab.run("document.getElementById('find').click()")
    tab.run("document.getElementById('stop').click()")
    answered(tab)
    assert text_of(tab, "said").endswith("(stopped)")
    ends = time.monotonic() + 10
    while served.engine.running and time.monotonic() < ends:
        time.sleep(0.01)
    assert served.engine.running == 0


def test_without_a_mouse(tab: Tab, scene: Path) -> None:
    """Tab reaches everything in the order of the page, and each has a name and shows that it has the focus."""
    tab.call("Page.setInterceptFileChooserDialog", enabled=True)
    order = []
    for _ in range(12):
        tab.press("Tab")
        where = tab.run("document.activeElement.id || document.activeElement.tagName")
        if where == "BODY":
            break
        order.append(where)
        visible = tab.run("getComputedStyle(document.activeElement).outlineStyle")
        assert visible == "solid", where
        if where == "choose":
            tab.press("Enter")
            tab.give_file("#file", scene)
            tab.until("document.getElementById('shown').naturalWidth > 0")
        if where == "text":
            tab.type(EXPRESSION)
    assert [each for each in order if each not in ("A", "INPUT")] == [
        "choose", "patches", "text", "keep", "find", "ask",
    ]  # fmt: skip
    assert order[0] == "A", "the first leads to the question"
    assert order.count("INPUT") == 1, "the radio buttons are one stop"
    tab.call("Page.setInterceptFileChooserDialog", enabled=False)
    tab.run("document.getElementById('find').focus()")
    tab.press(" ")
    answered(tab)
    assert text_of(tab, "said").startswith("[")
    assert tab.run("document.activeElement.id") == "find", "the focus is where it was"


def test_everything_has_a_name_and_a_role(tab: Tab) -> None:
    nodes = [each for each in tab.call("Accessibility.getFullAXTree")["nodes"] if not each["ignored"]]
    unnamed = [
        each
        for each in nodes
        if any(p["name"] == "focusable" and p["value"]["value"] for p in each.get("properties", ()))
        and not each.get("name", {}).get("value")
    ]
    assert not unnamed
    roles = {each["role"]["value"] for each in nodes}
    assert {"main", "banner", "heading", "button", "textbox", "slider", "radio", "alert", "status"} <= roles
    named = {each["name"]["value"] for each in nodes if "name" in each}
    assert {"An expression to find, or a question to ask", "Find", "Ask"} <= named
    assert tab.run("document.documentElement.lang") == "en"
    assert tab.run("document.getElementById('answer').getAttribute('aria-live')") == "polite"
    assert tab.run(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size === document.querySelectorAll('[id]').length"
    )


CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = text => { const [r, g, b] = rgb(text).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (rgb(c)[3] !== 0) return c; } return 'rgb(255,255,255)'; };
  const low = [];
  document.getElementById('error').textContent = 'Wrong.';
  for (const e of document.querySelectorAll('body *')) {
    if (!e.offsetParent || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.push(`${e.tagName}#${e.id} ${ratio.toFixed(2)}`);
  }
  for (const e of document.querySelectorAll('#bar span')) {
    const [a, b] = [light(getComputedStyle(e).backgroundColor), light(ground(document.getElementById('bar')))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 3) low.push(`bar ${e.className}`);
  }
  return low;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_width_and_motion(tab: Tab, scene: Path, scheme: str) -> None:
    preferences = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    tab.call("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in preferences.items()])
    tab.call("Emulation.setDeviceMetricsOverride", width=320, height=700, deviceScaleFactor=1, mobile=False)
    try:
        choose(tab, scene)
        write(tab, EXPRESSION)
        tab.press("Enter")
        answered(tab)
        assert tab.run("document.querySelectorAll('#bar span').length") == 5
        assert tab.run(CONTRAST) == []
        assert tab.run("document.documentElement.scrollWidth") <= 320, "nothing is cut off at the right"
        assert tab.run("getComputedStyle(document.querySelector('#bar span')).transitionDuration") == "0s"
    finally:
        tab.call("Emulation.clearDeviceMetricsOverride")
        tab.call("Emulation.setEmulatedMedia", features=[])


def test_a_key_is_asked_for_and_kept_in_memory_alone(window: Tab, engine: Engine, scene: Path) -> None:
    with server_of(engine, HttpSettings(keys=Keys([KEY]))) as guarded:
        window.open(f"{guarded.address}/")
        window.until("!document.getElementById('key-row').hidden")
        window.until("document.getElementById('model').textContent.includes('key is needed')")
        window.run("document.getElementById('key').focus()")
        window.type(KEY)
        window.press("Tab")
        window.until("document.getElementById('model').textContent.startsWith('shapes:')")
        assert window.run("document.getElementById('positions-row').hidden"), "baselines are not offered here"
        choose(window, scene)
        write(window, EXPRESSION)
        window.press("Enter")
        answered(window)
        assert text_of(window, "said").startswith("[")
        assert window.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert not any(KEY in each for each in window.requested)
        window.open(f"{guarded.address}/")
        window.until("!document.getElementById('key-row').hidden")
        assert window.run("document.getElementById('key').value") == ""


def test_a_server_that_is_gone_is_said(window: Tab, engine: Engine, scene: Path) -> None:
    with server_of(engine, HttpSettings()) as served:
        window.open(f"{served.address}/")
        window.until("document.getElementById('model').textContent.startsWith('shapes:')")
        choose(window, scene)
    write(window, EXPRESSION)
    window.press("Enter")
    answered(window)
    assert text_of(window, "error") == "The server cannot be reached. Is it still running?"


def test_pixels_of_pasted_images(tab: Tab, scene: Path) -> None:
    """A pasted image, and one that is dropped."""
    content = io.BytesIO()
    Image.open(scene).save(content, "PNG")
    encoded = base64.b64encode(content.getvalue()).decode()
    for event, field in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        kind = "ClipboardEvent" if event == "paste" else "DragEvent"
        tab.run("document.getElementById('image-name').textContent = ''")
        tab.run(
            f"""(async () => {{ const content = Uint8Array.from(atob('{encoded}'), c => c.charCodeAt(0)), data = new DataTransfer();
            data.items.add(new File([content], 'one.png', {{ type: 'image/png' }}));
            document.body.dispatchEvent(new {kind}('{event}', {{ {field}: data, bubbles: true, cancelable: true }})); }})()"""
        )
        tab.until("document.getElementById('image-name').textContent.includes('96 x 96 pixels')")
