"""A visit to the page in a headless browser: stream, another method, dropped pictures, reset."""

from __future__ import annotations

import functools
import os
import re
import shutil
from pathlib import Path

import pytest
from torchvision.transforms.functional import to_pil_image

import ttt_plugins as tp
from ttt_plugins.app.page import build_page, launch
from ttt_plugins.demo import load_sample

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
MODEL = "bundled:mgg-resnet26-cifar10"
SECONDS = 120
#: Set to write the picture that docs/app.md shows.
SCREENSHOT = os.environ.get("TTT_SCREENSHOT")


def build(method):
    if method == "mgg":
        return tp.from_pretrained(MODEL)
    return tp.wrap(tp.from_pretrained(MODEL), method)


@pytest.fixture
def address():
    page = build_page(build, ["mgg", "tent"], title=MODEL)
    yield launch(page, host="127.0.0.1", wait=False)
    page.close()


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(
            "window-size=1280,1100",
            "disable-dev-shm-usage",
            f"user-data-dir={tmp_path / 'profile'}",
        ),
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def text(browser, place: str) -> str:
    return browser.find_element(By.ID, place).text


def wait(browser, place: str, pattern: str) -> str:
    """The text of a part of the page as soon as it matches."""
    WebDriverWait(browser, SECONDS, ignored_exceptions=(Exception,)).until(
        lambda _: re.search(pattern, text(browser, place))
    )
    return text(browser, place)


def click(browser, place: str) -> None:
    browser.find_element(By.ID, place).click()


def test_a_visit(address, browser, tmp_path):
    browser.get(address)
    wait(browser, "method", "tent")
    click(browser, "start")
    told = wait(browser, "status", r"^192 pictures")
    source, adapter = map(float, re.search(r"source ([\d.]+) %, mgg ([\d.]+) %", told).groups())
    images = load_sample(n=192)
    expected = [
        100
        * sum(
            (net(part / 255).argmax(1) == labels).sum().item()
            for part, labels in zip(
                images.images["fog"].split(16), images.labels.split(16), strict=True
            )
        )
        / 192
        for net in map(functools.partial(build), ("source", "mgg"))
    ]
    assert [source, adapter] == pytest.approx(expected, abs=0.06)
    assert "seen 192" in text(browser, "health")
    assert len(browser.find_elements(By.CSS_SELECTOR, ".gallery-item, .thumbnail-item")) >= 8
    if SCREENSHOT:
        browser.execute_script("window.scrollTo(0, 0)")
        browser.save_screenshot(SCREENSHOT)

    click(browser, "reset")
    wait(browser, "status", "Back at the source")
    browser.find_element(By.XPATH, "//*[@id='method']//label[contains(., 'tent')]").click()
    files = []
    for row in range(3):
        file = Path(tmp_path / f"{row}.png")
        to_pil_image(images.images["clean"][row]).save(file)
        files.append(str(file))
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys("\n".join(files))
    WebDriverWait(browser, SECONDS).until(
        lambda _: (
            browser.find_element(By.CSS_SELECTOR, "#pictures input").get_attribute("value")
            == "dropped pictures"
        )
    )
    click(browser, "start")
    told = wait(browser, "status", r"^3 pictures")
    assert "no labels" in told
    assert "tent" in told
