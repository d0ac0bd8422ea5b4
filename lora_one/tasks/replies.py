"""Find the program in a reply."""

import ast
import re
from collections.abc import Sequence

FENCE = "```"
# An opening fence may name the language; what else stands on its line is no code.
_OPENING = re.compile(r"```[ \t]*(\w[\w+#.-]*)?[^\n]*(?:\n|$)")


def first_code_block(text: str) -> str | None:
    """Return what stands between the first pair of fences, or after the only one; else None."""
    opening = _OPENING.search(text)
    if opening is None:
        return None
    code, _, _ = text[opening.end() :].partition(FENCE)
    return code if code.strip() else None


def up_to_first_block(text: str) -> str | None:
    """Return a text up to the end of its first code block, closed if it is not; else None."""
    before, fence, rest = text.partition(FENCE)
    if not fence:
        return None
    return f"{before}{FENCE}{rest.partition(FENCE)[0]}{FENCE}"


def up_to(text: str, stops: Sequence[str]) -> str:
    """Cut a text where the first of ``stops`` begins."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


def code_of(reply: str, stops: Sequence[str], *, inside_block: bool) -> str | None:
    """Return the code of a reply, or None where there is none.

    Args:
        reply: The raw reply.
        stops: A reply without a code block ends where one of these begins.
        inside_block: The prompt has opened a code block, so that the reply begins within it.
    """
    opens_block = reply.lstrip().startswith(FENCE)
    # A reply that begins with an indented line goes on with the code before it: a fence ends it.
    goes_on = reply.lstrip("\r\n")[:1] in (" ", "\t") and not opens_block
    if inside_block and not opens_block:
        code = reply.partition(FENCE)[0]
    else:
        block = None if goes_on else first_code_block(reply)
        code = up_to(reply, (*stops, FENCE)) if block is None else block
    return code if code.strip() else None


def defines(code: str, name: str) -> bool:
    """Say whether the code defines a function or class of that name, not within another."""
    return (
        re.search(rf"^(async[ \t]+)?(def|class)[ \t]+{re.escape(name)}\b", code, re.M) is not None
    )


def names_defined(code: str) -> set[str]:
    """Return the functions, classes and variables that trusted code defines, not nested ones."""
    found: set[str] = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def names_used(code: str) -> set[str]:
    """Return the names that trusted code reads."""
    return {
        node.id
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
