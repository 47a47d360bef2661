"""A real Chromium that opens pages, and questions that can be asked of an open page.

`fedgan` never needs a browser: the pages do. Debian's packages are `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

INSTALL = "apt-get install chromium chromium-driver"
REQUIRED = (
    "CI",
    "FEDGAN_REQUIRE_BROWSER",
)  # environment variables that make a missing browser a failure
# Nothing that goes to the network by itself; the sandbox does not start as root.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
SIZES = {
    "desktop": (1280, 900),
    "phone": (360, 740),
    "paper": (718, 1000),
}  # paper: A4 within 1 cm of margin, at 96 an inch


def executables() -> tuple[str, str] | None:
    """Chromium and its driver, or None where one of them is not there."""
    browser = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def require_browser() -> tuple[str, str]:
    """Chromium and its driver. Fails without them where one of `REQUIRED` is set, and skips everywhere else."""
    found = executables()
    if found is not None:
        return found
    reason = f"no chromium and chromedriver on the PATH: {INSTALL}"
    if any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in REQUIRED):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A headless Chromium with a new profile in the empty folder `profile`; it is ended with the block."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver = require_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--window-size={SIZES['desktop'][0]},{SIZES['desktop'][1]}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The path is given, so that selenium looks for no driver of its own on the network.
    opened = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        opened.set_page_load_timeout(30)
        yield Browser(opened)
    finally:
        opened.quit()


class Browser:
    """What the tests ask of a page: in which light and size it is shown, and what is on it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(
        self, page: Path, scheme: str = "light", size: str = "desktop", media: str = "screen"
    ) -> None:
        """Open a page afresh from its file; logs begin anew."""
        width, height = SIZES[size]
        self.command(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == "phone",
        )
        self.driver.get("about:blank")
        self.logs()
        self.driver.get(page.resolve().as_uri())
        deadline = (
            time.monotonic() + 30
        )  # on a busy machine the driver may come back before the page is parsed
        while self.run("return document.readyState") != "complete" and time.monotonic() < deadline:
            time.sleep(0.05)

    def logs(self) -> tuple[list[str], list[str]]:
        """(console messages of level warning or error, addresses asked for) since the last call."""
        console = [
            f"{row['level']}: {row['message']}"
            for row in self.driver.get_log("browser")
            if row["level"] not in ("INFO", "DEBUG")
        ]
        asked = []
        for row in self.driver.get_log("performance"):
            message = json.loads(row["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                params = message["params"]
                asked.append(str(params.get("request", params)["url"]))
        return console, asked

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        answer: dict[str, Any] = self.driver.execute_cdp_cmd(name, parameters)
        return answer

    def press(self, key: str, code: int) -> None:
        """A key goes down and up again, as the reader's would."""
        for kind in ("rawKeyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def pdf(self) -> bytes:
        return base64.b64decode(self.command("Page.printToPDF", printBackground=True)["data"])

    def tree(self) -> list[dict[str, Any]]:
        """The page as assistive technology gets it: a dict a node that is not ignored, with `role` and `name`."""
        nodes = self.command("Accessibility.getFullAXTree")["nodes"]
        return [
            {
                "role": node.get("role", {}).get("value", ""),
                "name": str(node.get("name", {}).get("value", "")),
            }
            for node in nodes
            if not node.get("ignored")
        ]


CONTRAST = """
// Text and lines of charts whose contrast with what lies behind them is below the limit (WCAG 2.2): [[text or class, ratio]].
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = s => {
  const m = (s.match(/[\\d.]+/g) || []).map(Number);
  return m.length < 3 ? null : [m[0], m[1], m[2], m.length > 3 ? m[3] : 1];
};
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const paper = e => {
  const layers = [];
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c && c[3] > 0) { layers.push(c); if (c[3] === 1) break; }
  }
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
};
// In a chart: the last filled bar drawn before the text and below its middle.
const behind = text => {
  const box = text.getBoundingClientRect(), x = box.left + box.width / 2, y = box.top + box.height / 2;
  let found = null;
  for (const rect of text.ownerSVGElement.querySelectorAll('rect')) {
    if (!(rect.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
    const r = rect.getBoundingClientRect();
    if (r.left <= x && x <= r.right && r.top <= y && y <= r.bottom) found = parse(getComputedStyle(rect).fill);
  }
  return found || paper(text.ownerSVGElement);
};
const low = [];
let seen = 0;
const judge = (element, words, colour, ground, style) => {
  const mixed = over(colour, ground), a = light(mixed), b = light(ground);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  seen += 1;
  if (ratio < (large ? 3 : 4.5)) low.push([words.slice(0, 60), Math.round(ratio * 100) / 100]);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const words = node.textContent.trim(), element = node.parentElement;
  if (!words || element.closest('svg, title, .unseen')) continue;
  if (!element.checkVisibility({checkVisibilityCSS: true})) continue;
  const style = getComputedStyle(element);
  judge(element, words, parse(style.color), paper(element), style);
}
for (const text of document.querySelectorAll('svg text')) {
  if (!text.checkVisibility()) continue;
  const style = getComputedStyle(text);
  judge(text, text.textContent.trim(), parse(style.fill), behind(text), style);
}
// What a chart draws with lines (1.4.11): 3 to 1.
for (const mark of document.querySelectorAll('svg .whisker, svg .line')) {
  if (!mark.checkVisibility()) continue;
  const style = getComputedStyle(mark), colour = parse(style.stroke), ground = paper(mark.ownerSVGElement);
  const mixed = over([...colour.slice(0, 3), colour[3] * Number(style.opacity)], ground), a = light(mixed), b = light(ground);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 3) low.push([mark.getAttribute('class'), Math.round(ratio * 100) / 100]);
}
return [seen, low];
"""
