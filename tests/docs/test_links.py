"""Every link of the pages leads somewhere, anchors included."""

import pytest

from .pages import ROOT, anchors, links, name_of, pages


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_relative_link_and_anchor_resolves(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads to nothing"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link} leaves the repository"
        if anchor:
            assert target.suffix == ".md", f"{name_of(page)}: {link}: only pages have anchors here"
            known = anchors(target)
            assert anchor in known, f"{name_of(page)}: {link}: no such heading; {sorted(known)}"


def test_links_and_anchors_are_found_as_github_makes_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three, four\n## Same\n## Same\n[a](b.md#c) `[no](d)` [web](https://e.org)\n"
        "```\n# no heading\n[no](f)\n```\n## With [a link](g.md)\n"
    )
    assert anchors(page) == {"one-two-three-four", "same", "same-1", "with-a-link"}
    assert links(page) == ["b.md#c", "g.md"]
