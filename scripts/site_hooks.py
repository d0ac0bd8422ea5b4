"""What the site (mkdocs.yml) needs beyond the pages in docs/, which are also read on GitHub.

Its front page is README.md. Files of the repository that a page links to are copied into the site,
below ``source/``, Markdown as a page, so that no link leads out. Pages that the menu does not name
come last in it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FRONT = "index.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that the menu does not name."""
    named = set(_leaves(config.nav))
    docs = Path(config.docs_dir)
    pages = sorted(file.relative_to(docs).as_posix() for file in docs.rglob("*.md"))
    others = [page for page in pages if page not in named]
    config.nav += [{"More": others}] if others else []
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page, and what the pages link to outside docs/."""
    files.append(File.generated(config, FRONT, abs_src_path=str(ROOT / "README.md")))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        source = repository_path(waiting.pop().src_uri)
        for _, link, _ in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            path = _target(source, link)
            if (ROOT / path).is_file() and site_path(path) not in files.src_uris:
                added = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
                files.append(added)
                waiting += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links lead to where their targets are in the site; a folder is in none."""
    source = repository_path(page.file.src_uri)

    def relink(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        path = _target(source, link)
        if (ROOT / path).is_dir():
            return text
        if not (ROOT / path).is_file():
            return match[0]
        there = posixpath.relpath(site_path(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({there}{anchor or ''})"

    return LINK.sub(relink, markdown)


def site_path(path: str) -> str:
    """Return where a file of the repository is in the site."""
    if path == "README.md":
        return FRONT
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def repository_path(uri: str) -> str:
    """Return which file of the repository a file of the site is; the inverse of ``site_path``."""
    if uri == FRONT:
        return "README.md"
    return uri.removeprefix("source/") if uri.startswith("source/") else f"docs/{uri}"


def _target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [leaf for part in parts for leaf in _leaves(part)]
