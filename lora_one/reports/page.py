"""The self-contained ``report.html``: one file, no request to anywhere, safe against its contents.

Text from run folders, model output above all, is data: it travels as JSON in which ``<`` is
escaped, and the script puts it into the page as text nodes only. On top of that the page's own
content security policy lets no script run but this one, known by its hash, and no request leave.

The runs' own pages are compressed one by one and read when they are opened, so that a thousand runs
fit into a page that shows its first table at once.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from lora_one.reports.style import css_variables

SCRIPTS = ("dom.js", "charts.js", "tables.js", "overview.js", "run_page.js", "main.js")


def render_page(title: str, data: dict[str, Any], details: Iterable[str]) -> str:
    """Return the page.

    Args:
        title: Of the page; any text.
        data: What ``page_data.overview`` returns.
        details: Per run, in the order of the table of runs, what ``pack`` returns.
    """
    style = css_variables() + _asset("report.css")
    script = "\n".join(_asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    blocks = "\n".join(
        f'<script type="text/plain" id="run-{index}">{packed}</script>'
        for index, packed in enumerate(details)
    )
    # The details come last: the browser paints the overview before it has read them.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header id="head"></header>
<main id="main" tabindex="-1"></main>
<noscript><p>This page needs JavaScript. The same tables are in report.md.</p></noscript>
<script type="application/json" id="data">{embed(data)}</script>
<script>{script}</script>
{blocks}
</body>
</html>
"""


def pack(details: dict[str, Any]) -> str:
    """Compress a run's details to text that no HTML parser can misread: gzip, base64."""
    text = _to_json(details, ensure_ascii=False)
    packed = gzip.compress(text.encode("utf-8", errors="replace"), compresslevel=6, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def embed(data: dict[str, Any]) -> str:
    """Return JSON that ends no script element and holds nothing but JSON."""
    text = _to_json(data, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _to_json(value: Any, *, ensure_ascii: bool) -> str:
    options: dict[str, Any] = {"separators": (",", ":"), "default": str}
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ensure_ascii, **options)


def _finite(value: Any) -> Any:
    """Write what JSON has no number for as text: NaN and infinities."""
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _asset(name: str) -> str:
    return (files("lora_one.reports") / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
