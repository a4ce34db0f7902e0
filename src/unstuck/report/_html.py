"""HTML that is escaped by construction: whatever is not `Html` yet is text and becomes harmless."""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any


class Html(str):
    """A piece of finished HTML."""

    __slots__ = ()


def tag(name: str, *children: str, attrs: Mapping[str, str] | None = None) -> Html:
    """An element; `name` may carry classes, as in `td.number`."""
    name, *classes = name.split(".")
    given = {**({"class": " ".join(classes)} if classes else {}), **(attrs or {})}
    opened = "".join(f' {key}="{html.escape(value)}"' for key, value in given.items())
    return Html(f"<{name}{opened}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    return Html("".join(c if isinstance(c, Html) else html.escape(c) for c in children))


def json_script(data: Any, name: str) -> Html:
    """Data for a script; characters that could end the element become escapes, which JSON allows inside its strings."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Html(text), attrs={"type": "application/json", "id": name})
