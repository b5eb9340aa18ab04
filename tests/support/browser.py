"""A board as a process, and a headless Chromium that looks at it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.source_tree import REPOSITORY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE = 120  # seconds, for a machine that does other things as well


class BoardProcess:
    """`erniekit webui` in the working directory of the checkout."""

    def __init__(self, runs: Path, allow: Path, port: int = 0) -> None:
        command = [sys.executable, "-m", "erniekit", "webui", f"runs={runs}", f"port={port}", f"allow={allow}"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"board: ((http://127\.0\.0\.1:(\d+))/login\?key=\S+)", line):
                self.link, self.address, self.port = found[1], found[2], int(found[3])
                return
        raise AssertionError("".join(said))

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the process by a signal."""
        self.process.send_signal(number)
        self.process.wait(30)
        self.process.stderr.close()


class Page:
    """A browser with the words in which a test speaks of a page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Go to a page, and wait until its script listens."""
        self.driver.get(address)
        self.wait(lambda: self.js("document.documentElement.dataset.ready") == "", address)

    def js(self, code: str, *values: Any) -> Any:
        """The value of a JavaScript expression; $ finds an element by its id."""
        return self.driver.execute_script(f"const $ = (id) => document.getElementById(id); return {code}", *values)

    def find(self, selector: str) -> Any:
        self.wait(lambda: self.driver.find_elements("css selector", selector), selector)
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """What an element shows; "" where there is none (now: pages replace their elements)."""
        return self.js("document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def click(self, selector: str) -> None:
        self.find(selector)
        self.js("document.querySelector(arguments[0]).click()", selector)

    def type(self, selector: str, text: str) -> None:
        self.find(selector).clear()
        self.find(selector).send_keys(text)

    def choose(self, selector: str, value: str) -> None:
        self.wait(
            lambda: value in self.js(f"[...document.querySelector('{selector}').options].map((o) => o.value)"), value
        )
        self.js(
            f"(document.querySelector('{selector}').value = arguments[0], "
            f"document.querySelector('{selector}').dispatchEvent(new Event('change')))",
            value,
        )

    def wait(self, condition: Callable[[], Any], what: str = "") -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            shown = self.js("document.body.innerText.slice(0, 2000)") if time.monotonic() > deadline else ""
            assert time.monotonic() < deadline, f"{what or condition}: not within {PATIENCE} s:\n{shown}"
            time.sleep(0.1)

    def problems(self) -> list[str]:
        """Errors and warnings of the console since the last call, and requests that left this machine."""
        said = [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                url = message["params"].get("request", message["params"])["url"]
                said += [] if url.startswith(("http://127.0.0.1:", "data:", "about:", "chrome-untrusted:")) else [url]
        return said


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser of its own, with an empty profile. Where none starts, as in a container that forbids it, the test is
    skipped.
    """
    import pytest
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", "--lang=en"):
        options.add_argument(word)
    options.add_argument("--window-size=1440,1000")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"{CHROMIUM} does not start: {error.msg}")
    try:
        page = Page(driver)
        driver.get("about:blank")
        page.problems()  # those of the browser's own first page
        yield page
    finally:
        driver.quit()
