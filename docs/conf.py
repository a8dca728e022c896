"""How the documentation site is built: `make docs`. Pages are Markdown, the API reference comes from the docstrings."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pygments.lexers.special import TextLexer

from fastif import __version__

project = "fastif"
version = release = __version__
html_title = f"fastif {__version__}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["fastif.css"]
html_show_sphinx = html_copy_source = html_show_sourcelink = False
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
autodoc_mock_imports = [name for name in ("transformers", "lightning") if importlib.util.find_spec(name) is None]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 90
smartquotes = False


def _name(match: re.Match[str]) -> str:
    """`name` of a docstring: a reference where there is such an object, code anyway."""
    text = match[1]
    if re.fullmatch(r"[A-Za-z_][\w.]*", text):
        return f":py:obj:`{text}`"
    return f"``{text}``" if text.strip() == text else text


def _line(line: str) -> str:
    """A line of a docstring as reStructuredText: outside of backticks nothing is markup."""
    parts = re.split(r"(`[^`]+`)", line)
    for position, part in enumerate(parts):
        if position % 2:
            parts[position] = _name(re.fullmatch("`([^`]+)`", part))  # pyright: ignore[reportArgumentType]
            continue
        escaped = re.sub(r"([*|\\`])", r"\\\1", part)
        escaped = re.sub(r"(?<=\w)_(?!\w)", r"\\_", escaped)
        parts[position] = re.sub(r"docs/(math|removal|evaluation)\.md", r":doc:`docs/\1.md </\1>`", escaped)
    # A role ends at a space or at punctuation: what else touches it is set apart by an escaped space.
    text = parts[0]
    for before, part in pairwise(parts):
        inside = part.startswith((":py:obj:", "``"))
        glued = (inside and before[-1:].strip() and before[-1:] not in "([{<'\"-/:") or (
            not inside and before.startswith((":py:obj:", "``")) and re.match(r"\w", part)
        )
        text += ("\\ " if glued else "") + part
    return text


def _markup(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `names`, sections and doctests; formulas and drawings are indented."""
    del app, name, options
    made: list[str] = []
    doctest = section = literal = False
    for number, line in enumerate(lines):
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if not stripped:
            doctest = literal = False
            made.append(line)
            continue
        if stripped.startswith(">>>"):
            doctest = True
        if re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes):", stripped) and indent == 0:
            section = True
            made.append(line)
            continue
        if indent == 0:
            section = False
        alone = number == 0 or not lines[number - 1].strip()
        if indent and alone and not section and not doctest and not re.match(r"[-*] |\d+\. ", stripped):
            literal = True
            made += ["::", ""]
        made.append(line if doctest or literal else line[:indent] + _line(stripped))
    if what == "class" and isinstance(obj, type) and issubclass(obj, tuple) and hasattr(obj, "_fields"):
        made += ["", *_fields(obj)]
    lines[:] = [*made, ""]


def _fields(kind: type) -> list[str]:
    """The fields of a NamedTuple with the comments beside them."""
    found: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        match = re.fullmatch(r"    (\w+): ([^#=]+?)(?: = [^#]+?)?(?:\s+# (.*))?", line)
        if match and match[1] in kind._fields:  # pyright: ignore[reportAttributeAccessIssue]
            comment = f": {_line(match[3])}" if match[3] else ""
            found.append(f"- ``{match[1]}`` (``{match[2].strip()}``){comment}")
    return found


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of NamedTuples stand in a list of their own."""
    del app, what, name, options
    return True if type(obj).__name__ in ("_tuplegetter", "member_descriptor") else skip


def _source(app: Any, name: str, text: list[str]) -> None:
    """Links to files outside of the site are their names here."""
    del app
    if not name.startswith("api/"):
        text[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", text[0])


def setup(app: Any) -> None:
    app.connect("source-read", _source)
    app.add_lexer("mermaid", TextLexer)  # a drawing where GitHub shows the page, its text here
    app.connect("autodoc-process-docstring", _markup, priority=100)  # before napoleon
    app.connect("autodoc-skip-member", _skip)
