"""What each cause looks like, what proves it and what cures it: the page of faults, section by section."""

import difflib
import functools
import re
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

PAGE = Path(__file__).with_name("faults.md")
_HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)


@functools.cache
def sections() -> dict[str, str]:
    """The text of each code's section, in the order of the page."""
    parts = _HEADING.split(PAGE.read_text(encoding="utf-8"))[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name: text.strip() for name, text in pairs if re.fullmatch(r"[a-z0-9-]+", name)}


def explanation(code: str) -> RenderableType:
    """The section of a code; ValueError with the nearest ones where there is none."""
    text = sections().get(code)
    if text is None:
        near = difflib.get_close_matches(code, sections(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`unstuck explain` lists them"
        raise ValueError(f"the code of a cause was needed, got {code!r}: {hint}")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links lead nowhere on a terminal
    return Group(Text(code, style="bold"), Text(), Markdown(re.sub(r"\n\*\*", "\n\n**", plain)))


def causes() -> Table:
    """Every code, with what the run looks like."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for code, text in sections().items():
        table.add_row(code, _looks(text))
    return table


def _looks(text: str) -> str:
    found = re.search(r"\*\*Looks like\*\* (.+?)[.;](?:\s|$)", text, re.DOTALL)
    return " ".join((found[1] if found else text.split(". ")[0]).split()).replace("`", "").rstrip(".")
