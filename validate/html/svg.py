"""An SVG as Matplotlib writes it, made part of a page: the page's colours and font, identifiers of its own."""

import re
from xml.etree import ElementTree

from himap_export.validate.html.theme import COLOURS

ROLES = {on_white: role for role, (on_white, _) in COLOURS.items()}
REFERENCE = re.compile(r"url\(#([^)]+)\)")


def themed(svg: bytes, prefix: str, kind: str, title: str, fixed: bool) -> str:
    """Markup for HTML, of class `kind`, read aloud as `title`; its identifiers that are used begin with `prefix`.

    A `fixed` one is never shown smaller than it is drawn. A colour of the theme's white paper becomes a variable that
    the page sets, with that colour where nothing sets it.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for child in [c for c in element if _name(c.tag) in ("metadata", "style")]:
            element.remove(child)
    used = {name for element in root.iter() for name in _references(element)}
    for element in root.iter():
        element.tag = _name(element.tag)
        element.tail = None  # between tags is only the indentation of a file
        element.text = (element.text or "").strip() or None
        element.attrib = {
            key: value
            for old, text in element.attrib.items()
            if (value := _value(key := _name(old), text, prefix, used))
        }
    width, height = root.get("width", "").removesuffix("pt"), root.get("height", "").removesuffix("pt")
    root.attrib = {
        "class": kind, "role": "img", "aria-label": title, "width": width, "height": height,
        "viewBox": root.get("viewBox", ""), "font-family": "system-ui, sans-serif", "stroke-linejoin": "round",
    }  # fmt: skip
    if fixed:
        root.set("style", f"min-width:{width}px")
    return ElementTree.tostring(root, encoding="unicode")


def _name(qualified: str) -> str:
    """Without its XML namespace: HTML knows svg's names, and href."""
    return qualified.rpartition("}")[2]


def _references(element: ElementTree.Element) -> list[str]:
    """The identifiers that an element's attributes refer to."""
    links = [text[1:] for key, text in element.attrib.items() if _name(key) == "href"]
    return links + [name for text in element.attrib.values() for name in REFERENCE.findall(text)]


def _value(key: str, text: str, prefix: str, used: set[str]) -> str:
    """An attribute's text in its new place; empty where it goes."""
    if key == "id":
        return f"{prefix}-{text}" if text in used else ""
    if key == "href":
        return f"#{prefix}-{text[1:]}"
    if key == "style":
        return _style(REFERENCE.sub(rf"url(#{prefix}-\1)", text))
    return REFERENCE.sub(rf"url(#{prefix}-\1)", text)


def _style(text: str) -> str:
    """Without fonts, which come from the page, and with the page's colours."""
    parts = [part.strip() for part in text.split(";") if part.strip() and not part.strip().startswith("font-family")]
    return re.sub("#[0-9a-f]{6}", lambda hue: _colour(hue[0]), ";".join(parts))


def _colour(hue: str) -> str:
    return f"var(--{ROLES[hue]},{hue})" if hue in ROLES else hue
