"""A headless Chromium, driven through its own driver: for screenshots, benchmarks and tests.

It needs ``chromium`` and ``chromedriver`` (Debian: ``apt-get install chromium chromium-driver``)
and the Python package ``selenium``; nothing is downloaded.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_SECONDS = 30


class NoBrowserError(Exception):
    """There is no browser that can be driven here; the message says what is missing."""


class Browser:
    """One open page.

    Args:
        driver: Selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, script: str) -> Any:
        """Run JavaScript until it returns something true, and return that.

        Raises:
            TimeoutException: It never did.
        """
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_SECONDS).until(lambda _: self.run(script))

    def emulate(self, *, dark: bool) -> None:
        """Let the system prefer a dark or a light page."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def resize(self, width: int, height: int, *, scale: float = 1.0, phone: bool = False) -> None:
        """Set the size of the window in CSS pixels."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone},
        )

    def screenshot(self, file: Path) -> None:
        """Write what the window shows."""
        self.driver.save_screenshot(str(file))

    def complaints(self) -> list[str]:
        """Return what the console was told since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return every address that was asked for since the last call."""
        entries = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        return [
            entry["params"]["request"]["url"]
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
        ]


@contextmanager
def open_page(file: Path, query: str = "") -> Iterator[Browser]:
    """Open a local file in a browser of its own.

    Raises:
        NoBrowserError: There is no browser, no driver, or no selenium.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise NoBrowserError("chromium and chromedriver are not installed")
    try:
        from selenium import webdriver
    except ImportError as error:
        raise NoBrowserError("the Python package selenium is not installed") from error
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument("--hide-scrollbars")
        options.add_argument(f"--user-data-dir={profile}")
        if os.geteuid() == 0:
            # Chromium's sandbox does not start as root. The page is a file that we wrote.
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        session = webdriver.Chrome(options=options, service=service)
        try:
            session.set_page_load_timeout(WAIT_SECONDS)
            # What the browser's own first page asked for is not the file's doing.
            session.get("about:blank")
            session.get_log("performance")
            session.get(file.resolve().as_uri() + query)
            yield Browser(session)
        finally:
            session.quit()
