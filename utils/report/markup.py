"""HTML and SVG in which untrusted text can't become markup."""

import html
import re

VOID = frozenset(("img", "meta"))  # elements without an end tag
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")  # not allowed in HTML


class Markup(str):
    """Text that is already HTML: the results of `tag` and `join`, and constants of the program."""

    __slots__ = ()


def tag(name, /, *content, **attributes):
    """`<name attribute="...">content</name>`, as Markup.

    Content that isn't Markup is escaped. Content and attributes that are None are omitted. `class_`
    means `class`, and an underscore within a name a hyphen.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(printable(value))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in VOID else f"{start}{join(*content)}</{name}>")


def join(*content):
    """Concatenate content as Markup; what isn't Markup is escaped."""
    return Markup(
        "".join(
            piece if isinstance(piece, Markup) else html.escape(printable(piece))
            for piece in content
            if piece is not None
        )
    )


def printable(value):
    """`str(value)` with replacements for characters that UTF-8 or HTML can't hold.

    File names in other encodings have such characters in Python, and appear in flags.
    """
    text = str(value).encode("utf-8", "replace").decode()
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text)
