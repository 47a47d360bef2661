"""Chromium for tests of the HTML reports (Debian packages `chromium` and `chromium-driver`)."""

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
# Environment variables that make a missing browser a failure.
REQUIRED = ("CI", "FEDGAN_REQUIRE_BROWSER")
# No network access in the background; the sandbox does not start as root.
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
# paper: A4 minus 1 cm of margin, at 96 pixels per inch
SIZES = {"desktop": (1280, 900), "phone": (360, 740), "paper": (718, 1000)}


def executables() -> tuple[str, str] | None:
    """Chromium and its driver, or None if one is missing."""
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
    """Chromium and its driver. Without them: fail if one of `REQUIRED` is set, else skip."""
    found = executables()
    if found is not None:
        return found
    reason = f"no chromium and chromedriver on the PATH: {INSTALL}"
    if any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in REQUIRED):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Run a headless Chromium with a new profile in the empty folder `profile`."""
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
    # With an explicit path, selenium does not search the network for a driver.
    opened = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        opened.set_page_load_timeout(30)
        yield Browser(opened)
    finally:
        opened.quit()


class Browser:
    """An open browser: display a page, read its content and logs."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(
        self, page: Path, scheme: str = "light", size: str = "desktop", media: str = "screen"
    ) -> None:
        """Load a page from its file and clear the logs."""
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
        # On a busy machine the driver may return before the page is parsed.
        deadline = time.monotonic() + 30
        while self.run("return document.readyState") != "complete" and time.monotonic() < deadline:
            time.sleep(0.05)

    def logs(self) -> tuple[list[str], list[str]]:
        """(console warnings and errors, requested URLs) since the last call."""
        console = [
            f"{row['level']}: {row['message']}"
            for row in self.driver.get_log("browser")
            if row["level"] not in ("INFO", "DEBUG")
        ]
        requests = []
        for row in self.driver.get_log("performance"):
            message = json.loads(row["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                params = message["params"]
                requests.append(str(params.get("request", params)["url"]))
        return console, requests

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script and return its value."""
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol."""
        result: dict[str, Any] = self.driver.execute_cdp_cmd(name, parameters)
        return result

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def pdf(self) -> bytes:
        return base64.b64decode(self.command("Page.printToPDF", printBackground=True)["data"])

    def tree(self) -> list[dict[str, Any]]:
        """The accessibility tree: `role` and `name` of each node that is not ignored."""
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
// Text and lines of charts with a contrast below the limit (WCAG 2.2): [[text or class, ratio]].
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = s => {
  const m = (s.match(/[\\d.]+/g) || []).map(Number);
  return m.length < 3 ? null : [m[0], m[1], m[2], m.length > 3 ? m[3] : 1];
};
const over = (top, under) =>
  [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
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
  const box = text.getBoundingClientRect();
  const x = box.left + box.width / 2, y = box.top + box.height / 2;
  let found = null;
  for (const rect of text.ownerSVGElement.querySelectorAll('rect')) {
    if (!(rect.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
    const r = rect.getBoundingClientRect();
    const inside = r.left <= x && x <= r.right && r.top <= y && y <= r.bottom;
    if (inside) found = parse(getComputedStyle(rect).fill);
  }
  return found || paper(text.ownerSVGElement);
};
const low = [];
let seen = 0;
const check = (words, colour, ground, style) => {
  const mixed = over(colour, ground), a = light(mixed), b = light(ground);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  seen += 1;
  if (ratio < (large ? 3 : 4.5)) low.push([words.slice(0, 60), Math.round(ratio * 100) / 100]);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const words = node.textContent.trim(), element = node.parentElement;
  if (!words || element.closest('svg, title, .unseen')) continue;
  if (!element.checkVisibility({checkVisibilityCSS: true})) continue;
  const style = getComputedStyle(element);
  check(words, parse(style.color), paper(element), style);
}
for (const text of document.querySelectorAll('svg text')) {
  if (!text.checkVisibility()) continue;
  const style = getComputedStyle(text);
  check(text.textContent.trim(), parse(style.fill), behind(text), style);
}
// Lines of charts (1.4.11): 3 to 1.
for (const mark of document.querySelectorAll('svg .whisker, svg .line')) {
  if (!mark.checkVisibility()) continue;
  const style = getComputedStyle(mark), colour = parse(style.stroke);
  const ground = paper(mark.ownerSVGElement);
  const mixed = over([...colour.slice(0, 3), colour[3] * Number(style.opacity)], ground);
  const a = light(mixed), b = light(ground);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 3) low.push([mark.getAttribute('class'), Math.round(ratio * 100) / 100]);
}
return [seen, low];
"""
