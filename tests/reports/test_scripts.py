"""The scripts beside the reports do what their first lines say."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script, *arguments):
    line = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)


def test_the_benchmark_measures_and_a_picture_is_taken(tmp_path, headless):
    options = ("--runs", 30, "--steps", 40, "--repeats", 1, "--keep", tmp_path)
    answer = run("benchmark_reports.py", *options)
    assert answer.returncode == 0, answer.stderr
    assert "report of 30 runs x 40 steps" in answer.stdout
    assert "| first contentful paint | 0." in answer.stdout
    picture = tmp_path / "picture.png"
    answer = run("report_screenshot.py", tmp_path / "report" / "report.html", picture, "--dark")
    assert answer.returncode == 0, answer.stderr
    with Image.open(picture) as image:
        assert image.width == 1400 * 1.5
        assert image.height > 1000
        assert image.convert("RGB").getpixel((3, 3)) == (20, 24, 28)


def test_without_a_page_there_is_no_picture(tmp_path):
    answer = run("report_screenshot.py", tmp_path / "report.html", tmp_path / "picture.png")
    assert answer.returncode == 2
    assert "make report makes one" in answer.stderr
