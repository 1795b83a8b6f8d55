"""The page in a real browser: Chromium drives the real command, on small runs of the scenes.

    python -m pytest tests/browser.py

A plain pytest does not run this file. It needs Gradio, selenium, and Chromium with its driver. PAGE_RUN=FOLDER and
PAGE_PICTURE=FILE.png take a picture of the page, of that run.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

import train
from sources import scenes

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --window-size=1200,1100").split()
SIDE = ".side:not(:has(.side))"  # Gradio nests elements of the same class
SECONDS = 60  # to wait for an answer, on a machine that has other things to do


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run of each model after one epoch on a few scenes."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = ["--epochs", "1", "--batch-size", "16", "--dim", "16", "--region-width", "16", "--feedforward", "16",
            "--text-layers", "1", "--device", "cpu", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SPLITS", {"train": 40, "val": 10, "test": 10})
        for model in ("tgdt", "user"):
            assert train.main([*tiny, "--model", model, "--out", str(folder / model)]) == 0
    return {model: folder / model for model in ("tgdt", "user")}


@contextmanager
def opened(*places: Path) -> Iterator[str]:
    """The address of a page. At the end Ctrl-C must end the command quietly."""
    command = [sys.executable, str(ROOT / "retrieve.py"), "page", *map(str, places)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        try:
            said = process.stdout.readline()
            assert (found := re.search(r"http://127\.0\.0\.1:\d+/", said)), said + process.stderr.read()
            yield found[0]
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 130 and out == "" and "Traceback" not in errors, errors
        finally:
            process.kill()


class Browser:
    """Chromium, driven step by step. Each step waits for what it leads to."""

    def __init__(self, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def all(self, css: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str = ".page") -> str:
        return "\n".join(element.text for element in self.all(css))

    def until(self, true: Callable[[], object]) -> None:
        """Wait. An element can vanish while it is looked at, since new answers replace the old ones."""
        wait = WebDriverWait(self.driver, SECONDS, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda _: true())

    def write(self, css: str, text: str) -> None:
        """Write into a box and press Enter."""
        box = self.all(css)[0]
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text or Keys.DELETE, Keys.ENTER)

    def paste(self, css: str, text: str) -> None:
        """The same for a text that would take long to type."""
        box = self.all(css)[0]
        self.driver.execute_script("arguments[0].value = arguments[1];"
                                   "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", box, text)
        box.send_keys(Keys.ENTER)

    def pictures(self, place: int) -> list[str]:
        """The pictures of a list, as addresses that hold them. place: 0 for the first list on the page."""
        lists = self.all("ol.pictures")
        return [image.get_attribute("src") for image in lists[place].find_elements(By.TAG_NAME, "img")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if not CHROMIUM or not shutil.which("chromedriver"):
        pytest.skip("Chromium or its driver is not installed")
    out = Browser(tmp_path_factory.mktemp("profile"))
    yield out
    out.driver.quit()


def test_one_run(runs, browser, tmp_path):
    with opened(runs["tgdt"]) as address:
        browser.driver.get(address)
        browser.until(lambda: len(browser.all("ol.pictures li")) == 20)  # the first caption is answered at once
        assert "The right picture" in browser.text() or "No right picture" in browser.text()

        browser.write("#caption textarea", "a red star above a blue ring")  # a caption finds pictures
        browser.until(lambda: browser.text(".query").split() == "a red star above a blue ring".split())
        assert len(browser.pictures(0)) == len(browser.pictures(1)) == 10
        assert "re-ranked" in browser.text() and browser.all(".up, .down")

        before = browser.pictures(0)
        browser.all(".query .word")[2].click()  # a word lights up regions
        browser.until(lambda: "more similar it is to “star”" in browser.text())
        assert browser.text("[aria-pressed=true]") == "star" and "similarity" in browser.text("ol.pictures")
        assert not set(before) & set(browser.pictures(0))

        browser.write("#k input[type=number]", "3")  # K
        browser.until(lambda: len(browser.all("ol.pictures li")) == 6)
        assert "the best of 3" in browser.text() and browser.text("[aria-pressed=true]") == "star"
        browser.write(".weight input[type=number]", "0")  # without the local similarity nothing moves
        browser.until(lambda: not browser.all(".up, .down"))
        assert browser.pictures(0) == browser.pictures(1)

        browser.write("#picture textarea, #picture input", "scene 7")  # a picture finds captions
        browser.until(lambda: len(browser.all("ol.captions li")) == 6 and browser.all("img.query[alt='scene 7']"))
        dark = browser.all("img.query")[0].get_attribute("src")
        browser.all("ol.captions .word")[0].click()
        browser.until(lambda: browser.all("img.query")[0].get_attribute("src") != dark)

        Image.new("RGB", (64, 48), "red").save(tmp_path / "mine.png")  # so does any picture
        browser.all("input[type=file]")[0].send_keys(str(tmp_path / "mine.png"))
        browser.until(lambda: browser.all("img.query[alt='mine.png']"))

        browser.write("#caption textarea", "a blue ring")
        browser.until(lambda: browser.all("ol.pictures button"))
        name = browser.all("ol.pictures button")[0].get_attribute("data-picture")
        browser.all("ol.pictures button")[0].click()  # and one that was found
        browser.until(lambda: browser.all(f"img.query[alt='{name}']"))

        asked = {json.loads(line["message"])["message"]["params"]["request"]["url"]
                 for line in browser.driver.get_log("performance") if "Network.requestWillBeSent\"" in line["message"]}
        assert all(url.startswith((address, "data:", "blob:", "chrome:")) for url in asked)  # no other host
        assert not [line for line in browser.driver.get_log("browser") if line["level"] == "SEVERE"]

        taken = subprocess.run([sys.executable, ROOT / "retrieve.py", "page", runs["tgdt"], "--port",
                                address.split(":")[-1].strip("/")], capture_output=True, text=True)
        assert taken.returncode == 2 and "--port" in taken.stderr and taken.stderr.count("\n") == 1


def test_what_cannot_be_answered_is_reported(runs, browser, tmp_path):
    with opened(runs["tgdt"]) as address:
        browser.driver.get(address)
        browser.until(lambda: len(browser.all("ol.pictures li")) == 20)
        bad = tmp_path / "bad.png"
        bad.write_text("no picture")
        for box, text, told in [
                ("#caption textarea", "", "The caption is empty"),
                ("#picture textarea, #picture input", "scene 500", "no picture 'scene 500'"),
                ("#picture textarea, #picture input", "/etc/passwd", "no picture '/etc/passwd'"),
                ("input[type=file]", str(bad), "bad.png: expected a picture")]:
            if "file" in box:
                browser.all(box)[0].send_keys(text)
            else:
                browser.write(box, text)
            browser.until(lambda told=told: told in browser.text("#message"))
            assert len(browser.all("ol.pictures li")) == 20 and str(tmp_path) not in browser.text()
        browser.paste("#caption textarea", "<img src=x onerror=alert(1)> ${1+1} {{7*7}} " + "red " * 2000)
        browser.until(lambda: "word pieces of a caption, and no more" in browser.text())
        assert browser.text("#message") == "" and not browser.all("img[src=x]")
        browser.paste("#caption textarea", "a " * 6000)
        browser.until(lambda: "at most 10,000" in browser.text("#message"))


def test_two_side_by_side(runs, browser):
    with opened(runs["tgdt"], runs["user"]) as address:
        browser.driver.get(address)
        browser.until(lambda: len(browser.all("ol.pictures li")) == 30)  # two lists and one
        left, right = browser.all(SIDE)
        assert left.location["y"] == right.location["y"] and left.location["x"] < right.location["x"]
        assert "re-ranked" in left.text and "This model has no tokens" in right.text
        assert len(browser.all(".weight")) == 1
        left.find_element(By.CSS_SELECTOR, ".word").click()
        browser.until(lambda: "white frame" in browser.all(SIDE)[0].text)
        assert "similarity 0" not in browser.all(SIDE)[1].text


@pytest.mark.skipif("PAGE_RUN" not in os.environ, reason="takes a picture of the page of PAGE_RUN")
def test_picture(browser):
    caption = os.environ.get("PAGE_CAPTION", "a small red star above a blue ring")
    with opened(Path(os.environ["PAGE_RUN"])) as address:
        browser.driver.get(address)
        browser.until(lambda: browser.all("ol.pictures li"))
        browser.write("#caption textarea", caption)
        browser.until(lambda: browser.text(".query").split() == caption.split())
        word = os.environ.get("PAGE_WORD", caption.split()[0])
        next(each for each in browser.all(".query .word") if each.text == word).click()
        browser.until(lambda: f"“{word}”" in browser.text())
        high = browser.driver.execute_script("return document.querySelector('.lists').getBoundingClientRect().bottom")
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": 1200, "height": int(high) + 24, "deviceScaleFactor": 1, "mobile": False})
        browser.driver.execute_script("document.activeElement.blur()")
        browser.driver.save_screenshot(os.environ["PAGE_PICTURE"])
