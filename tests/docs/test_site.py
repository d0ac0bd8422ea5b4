"""The site builds strictly, holds every page, and asks no other site for anything."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from .pages import ROOT, name_of, pages

needs_mkdocs = pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("material") is None,
    reason="mkdocs-material is not installed",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    answer = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return folder


@needs_mkdocs
def test_every_page_is_in_the_site_and_in_its_menu(site):
    front = (site / "index.html").read_text()
    for page in pages():
        name = name_of(page)
        path = re.sub(r"README\.md$", "index.md", name.removeprefix("docs/"))
        if not name.startswith("docs/") and name != "README.md":
            continue  # such a page is in the site where another one links to it
        path = path.replace(".md", ".html")
        assert (site / path).is_file()
        assert f'href="{path}"' in front or path == "index.html", f"{name}: not in the menu"


@needs_mkdocs
def test_every_link_of_the_site_leads_to_a_file_and_an_anchor_that_are_there(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"[a-z]+:|/", link):  # 404.html has absolute ones
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.name}: {link}"
            if anchor and target.suffix == ".html":
                assert f'id="{anchor}"' in target.read_text(), f"{page.name}: {link}"


@needs_mkdocs
def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]+)\"", text)
        assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == []
        assert "mermaid" not in text  # which the theme would load from elsewhere
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", style.read_text())
