"""HTML and SVG elements whose text is always escaped."""

from html import escape


class Markup(str):
    """Text that is HTML already."""


def element(tag: str, *children: str, **attributes: str | float) -> Markup:
    """`<tag name="value">children</tag>`; a child that is no `Markup` is text and is escaped.

    An underscore in an attribute's name stands for a hyphen, a leading one is dropped: `_class="note"`, `aria_hidden="true"`.
    """
    inner = "".join(child if isinstance(child, Markup) else escape(child, quote=False) for child in children)
    written = "".join(f' {name.removeprefix("_").replace("_", "-")}="{escape(str(value))}"' for name, value in attributes.items())
    end = "" if tag in VOID else f"{inner}</{tag}>"
    return Markup(f"<{tag}{written}>{end}")


VOID = frozenset({"img", "meta", "link", "br"})
