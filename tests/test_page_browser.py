"""The page in headless Chromium, in front of a whole service: what a user can see, press and hear of errors."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from constellation.roster import ROLES
from router.decide.fisher_rao import FisherRaoRouter
from router.http import keys, page
from tests.waiting import wait_for

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)
NO_BROWSER = f"needs {CHROMIUM} and {DRIVER} (Debian: apt-get install chromium chromium-driver)"
pytestmark = pytest.mark.skipif(not (CHROMIUM.exists() and DRIVER.exists()), reason=NO_BROWSER)
PROMPT = "The import statement combines two operations; it searches for the named module, then it binds the results"


class Browser:
    """A tab of headless Chromium, driven by the W3C WebDriver protocol: JSON over HTTP to chromedriver."""

    def __init__(self, driver: str, profile: Path):
        options = {"binary": str(CHROMIUM), "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}
        self.http = httpx.Client(timeout=None)
        self.session = driver
        found = self("POST", "/session", capabilities={"alwaysMatch": wanted})
        self.session = f"{driver}/session/{found['sessionId']}"

    def __call__(self, method: str, path: str, **body: Any) -> Any:
        said = self.http.request(method, self.session + path, json=body if method == "POST" else None).json()["value"]
        assert not (isinstance(said, dict) and "error" in said), said
        return said

    def open(self, url: str) -> None:
        self("POST", "/url", url=url)
        self.until("return 'ready' in document.documentElement.dataset")

    def do(self, script: str, *args: Any) -> Any:
        """What a script returns; `$` finds an element by its id."""
        prelude = "const $ = id => document.getElementById(id);"
        return self("POST", "/execute/sync", script=prelude + script, args=list(args))

    def until(self, script: str, *args: Any) -> Any:
        """What a script returns once that is true."""
        while not (found := self.do(script, *args)):
            time.sleep(0.02)
        return found

    def type(self, element: str, text: str) -> None:
        found = self("POST", "/element", using="css selector", value=f"#{element}")
        self("POST", f"/element/{next(iter(found.values()))}/value", text=text)

    def press(self, *keys: str) -> None:
        down = [{"type": "keyDown", "value": key} for key in keys]
        up = [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": down + up}])

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self("POST", "/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})

    def complaints(self) -> list[str]:
        """What the console said since the last time: scripts that failed, files not found, breaches of the CSP."""
        return [entry["message"] for entry in self("POST", "/se/log", type="browser")]


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return bool(httpx.get(url, timeout=None).json()["value"]["ready"])
    return False


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}", "--log-level=SEVERE"], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: driver.poll() is not None or is_ready(f"http://127.0.0.1:{port}/status"))
        browser = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        yield browser
        browser("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()


@contextlib.contextmanager
def serving(run: Path, **settings: Any) -> Iterator[str]:
    """The URL of the whole service of a run, answering from another thread."""
    from constellation.coordizer.tokenizer import Tokenizer
    from constellation.pipeline.prepare import open_plan
    from router.answer.local import LocalKernels
    from router.answer.service import Service
    from router.app import AppSettings, make_app
    from router.http.server import Server

    plan = open_plan(run)
    kernels = LocalKernels.from_run(run)
    service = Service(plan.config, FisherRaoRouter.load(plan.router), Tokenizer.load(plan.tokenizer), kernels)
    server = Server(make_app(service, AppSettings(**settings)), port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.close()
        thread.join()


@pytest.fixture(scope="module")
def url(micro_run: Path) -> Iterator[str]:
    with serving(micro_run) as where:
        yield where


WRITE = """$('prompt').value = arguments[0]; $('max_tokens').value = arguments[1]; $('seed').value = 7;
    $('ask').requestSubmit()"""
DONE = "return $('answer').getAttribute('aria-busy') === 'false' && $('status').textContent"


def test_an_answer_is_streamed_in_the_colours_of_its_kernels(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.do(WRITE, PROMPT, 120)
    browser.until("return $('answer').querySelector('.by')")
    status = browser.until(DONE)
    assert browser.do("return $('error').hidden") and "120 tokens" in status
    written = browser.do("""
        const legend = kernel => document.querySelector(`#legend tr[data-kernel=${kernel}] th`);
        return [...$('answer').querySelectorAll('.by')].map(span => [
            span.dataset.kernel, span.textContent.slice(span.firstChild.textContent.length),
            getComputedStyle(span).color, getComputedStyle(legend(span.dataset.kernel), '::before').backgroundColor,
        ])""")
    body = {
        "prompt": PROMPT,
        "max_tokens": 120,
        "seed": 7,
        "temperature": 0.8,
        "top_p": 0.95,
        "truncate_prompt_tokens": -1,
    }
    said = httpx.post(f"{url}/v1/completions", json=body, timeout=None).json()
    assert "".join(text for _, text, _, _ in written) == said["choices"][0]["text"]
    assert list(dict.fromkeys(kernel for kernel, *_ in written)) == said["constellation"]["kernels"]
    assert all(colour == legend for *_, colour, legend in written)
    assert len({colour for *_, colour, _ in written}) == len({kernel for kernel, *_ in written})
    assert browser.complaints() == []  # no breach of the CSP, no script that failed


def test_the_map_shows_the_roots_and_where_the_text_lies(browser: Browser, url: str, micro_run: Path) -> None:
    browser.open(url)
    assert browser.do("return $('roots').childElementCount") == 240
    assert browser.do("return [...$('kernels').children].map(g => g.dataset.kernel)") == [*ROLES, "ocean"]
    browser.type("prompt", PROMPT)  # it moves as one writes
    browser.until("return $('query').querySelector('.star')")
    said = httpx.post(f"{url}/route", json={"prompt": PROMPT}, timeout=None).json()
    drawn = page.e8_map(FisherRaoRouter.load(micro_run / "router"), [])
    u = np.array(said["z"][:8]) * drawn["scale"]
    x, y = np.array(drawn["view"]) @ (u / np.linalg.norm(u))
    at = "const star = $('query').querySelector('.star'); return star && [star.cx.baseVal.value, star.cy.baseVal.value]"
    browser.until(
        f"{at.replace('return star &&', 'const at =')}; return Math.abs(at[0] - arguments[0]) < 1e-3", float(x)
    )
    np.testing.assert_allclose(browser.do(at), [x, -y], atol=1e-3)
    shares = browser.do("return [...document.querySelectorAll('[role=meter]')].map(m => +m.ariaValueNow)")
    np.testing.assert_allclose(shares, list(said["posterior"].values()), atol=1e-6)
    likeliest = max(said["posterior"], key=said["posterior"].get)
    assert likeliest in browser.do("return $('place').textContent")


def test_stop_ends_the_answer_and_frees_the_service(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.do(WRITE, PROMPT, 60_000)
    browser.until("return $('answer').querySelector('.by')")
    assert browser.do("return $('send').disabled && !$('stop').disabled")
    browser.do("$('stop').click()")
    assert "stopped" in browser.until(DONE)
    assert browser.do("return $('error').hidden && !$('send').disabled && $('stop').disabled")
    wait_for(lambda: httpx.get(f"{url}/health", timeout=None).json()["requests"] == 0)


def test_the_keyboard_is_enough(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.type("prompt", PROMPT)
    browser.press("\ue009", "\ue007")  # Ctrl + Enter
    browser.until("return $('answer').querySelector('.by')")
    browser.press("\ue00c")  # Esc
    assert "stopped" in browser.until(DONE) or "200 tokens" in browser.do("return $('status').textContent")
    order = [browser.do("return document.activeElement.id")]
    for _ in range(5):
        browser.press("\ue004")  # Tab
        order.append(browser.do("return document.activeElement.id || document.activeElement.tagName"))
    assert order == ["prompt", "mode", "max_tokens", "send", "SUMMARY", "answer"]


def test_an_error_of_the_api_is_a_line(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.do("$('temperature').max = 9; $('mode').append(new Option('poseidon')); $('mode').value = 'poseidon'")
    browser.do(WRITE, PROMPT, 5)
    line = browser.until("return !$('error').hidden && $('error').textContent")
    assert line.startswith("400: ") and "poseidon" in line and "\n" not in line
    assert browser.do("return $('error').getAttribute('role')") == "alert" and browser.until(DONE)
    browser.complaints()


def test_a_service_with_keys_is_used_with_one(browser: Browser, micro_run: Path, tmp_path: Path) -> None:
    key = keys.add(tmp_path / "keys.json", "page")
    with serving(micro_run, keys=keys.Keys(tmp_path / "keys.json")) as where:
        browser.open(where)
        browser.do(WRITE, PROMPT, 5)
        assert "401" in browser.until("return !$('error').hidden && $('error').textContent")
        browser.do("$('key').value = arguments[0]", key)
        browser.do(WRITE, PROMPT, 5)
        browser.until("return $('status').textContent.startsWith('5 tokens')")
        assert browser.do("return $('error').hidden && localStorage.length + sessionStorage.length === 0")
    browser.complaints()


CONTRAST = """
    // WCAG 2: (L1 + .05) / (L2 + .05) of relative luminances; a canvas turns any CSS colour into sRGB
    const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const luminance = css => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = css;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const ground = node => {
        const css = getComputedStyle(node).backgroundColor;
        return css.endsWith(', 0)') ? ground(node.parentElement) : css;
    };
    const contrast = node => {
        const [low, high] = [getComputedStyle(node).color, ground(node)].map(luminance).sort((x, y) => x - y);
        return (high + .05) / (low + .05);
    };
    document.querySelector('details').open = true;
    $('error').hidden = false;
    $('error').textContent = 'x';
    for (const row of document.querySelectorAll('#legend tr[data-kernel]')) {
        const span = Object.assign(document.createElement('span'), {className: 'by', textContent: 'x'});
        span.style.cssText = row.style.cssText;
        $('answer').append(span);
    }
    const texts = 'p, label, small, h1, th, td, input, select, textarea, button, .by, kbd, summary, output';
    return [...document.querySelectorAll(texts)].filter(node => !node.disabled && !node.closest('noscript'))
        .map(node => [node.id || node.className || node.tagName, contrast(node)]);
"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_stands_out_in_both_schemes(browser: Browser, url: str, scheme: str) -> None:
    """WCAG 2 AA asks for 4.5."""
    browser.scheme(scheme)
    browser.open(url)
    found = browser.do(CONTRAST)
    assert len(found) > 60 and not [(name, ratio) for name, ratio in found if ratio < 4.5]


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(browser: Browser, url: str, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
    try:
        browser.open(url)
        browser.do("document.querySelector('details').open = true; $('answer').textContent = 'x'.repeat(999)")
        assert browser.do("return document.documentElement.scrollWidth") <= width
    finally:
        browser("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})
