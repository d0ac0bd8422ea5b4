"""Take the README's picture of a report: the top of ``report.html`` in a headless Chromium.

    python scripts/report_screenshot.py results/report/report.html docs/report.png

writes ``docs/report.png`` and, with ``--dark``, the dark page. It needs what ``headless.py`` says.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from headless import Browser, NoBrowserError, open_page

WIDTH = 1400
SCALE = 1.5
# A chart is drawn once its place on the page is known.
DRAWN = "return [...document.querySelectorAll('.drawing')].every((node) => node.childElementCount)"


def take(page: Path, picture: Path, *, dark: bool, run: str | None, height: int | None) -> None:
    """Write a picture of a page, or of one run's page in it.

    Args:
        page: ``report.html``.
        picture: A PNG.
        dark: Which theme.
        run: Name of a run, or None for the overview.
        height: In CSS pixels; None ends below the first two rows of charts.

    Raises:
        NoBrowserError: There is nothing to open the page with.
    """
    with open_page(page, f"?theme={'dark' if dark else 'light'}") as browser:
        browser.resize(WIDTH, height or 800, scale=SCALE)
        if run is not None:
            browser.run("location.hash = 'run/' + encodeURIComponent(arguments[0])", run)
            browser.wait_for("return !!document.querySelector('article.run')")
        browser.wait_for(DRAWN)
        if height is None:
            browser.resize(WIDTH, _below_charts(browser, rows=2), scale=SCALE)
            browser.wait_for(DRAWN)
        browser.screenshot(picture)


def _below_charts(browser: Browser, rows: int) -> int:
    """Return the height of a picture that ends below some rows of charts."""
    return browser.run(
        """
        const ends = [...new Set([...document.querySelectorAll('.chart')]
          .map((chart) => Math.ceil(chart.getBoundingClientRect().bottom + scrollY)))];
        return (ends[Math.min(arguments[0], ends.length) - 1] || 900) + 16;
        """,
        rows,
    )


def main(arguments: Sequence[str]) -> int:
    """Exit status 2 where there is no page or no browser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--run", help="name of a run whose page is shown")
    parser.add_argument("--height", type=int, help="in CSS pixels")
    options = parser.parse_args(arguments)
    if not options.page.is_file():
        print(f"error: there is no {options.page}; make report makes one", file=sys.stderr)
        return 2
    try:
        take(
            options.page,
            options.picture,
            dark=options.dark,
            run=options.run,
            height=options.height,
        )
    except NoBrowserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
