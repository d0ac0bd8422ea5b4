"""The Markdown pages that people read: where they are, their code blocks, links and anchors."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OTHERS = ("README.md", "CONTRIBUTING.md", "examples/README.md")
FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced code block; ``file`` is the name that stands alone in the line before it, or ''."""

    page: str
    line: int
    language: str
    file: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return README.md, the others that are there, and all of docs/."""
    others = [ROOT / name for name in OTHERS if (ROOT / name).is_file()]
    return [*others, *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the page's fenced code blocks, in order."""
    source = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(source):
        line = source.count("\n", 0, match.start()) + 1
        file = re.search(r"^`([^`]+)`:\n\n\Z", source[: match.start()], re.MULTILINE)
        text = re.sub(rf"^{match[1]}", "", match[4], flags=re.MULTILINE)
        language = match[3].strip()
        found.append(Block(name_of(page), line, language, file[1] if file else "", text))
    return found


def prose(page: Path) -> str:
    """Return the page without its code blocks and code spans."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`+[^`]+`+", lambda span: "x" * len(span[0]), text)


def links(page: Path) -> list[str]:
    """Return the targets of the page's links that are no addresses of the web."""
    return [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found
