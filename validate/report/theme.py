"""The colours of reports, light and dark, and the look of their charts."""

from typing import Any

# Role -> (on white, on dark). s0..s7 are series: Okabe and Ito's hues, for every kind of colour vision, at 3:1 contrast
# or better on both papers.
COLOURS = {
    "ink": ("#1b2028", "#e4e7ec"),
    "pale": ("#59626f", "#a3adba"),
    "line": ("#d9dde3", "#363d47"),
    "paper": ("#ffffff", "#14181d"),
    "wash": ("#f4f6f8", "#1d232b"),
    "link": ("#0b5cad", "#7db8f5"),
    "s0": ("#0072b2", "#56b0ea"),
    "s1": ("#c9500c", "#f58a4b"),
    "s2": ("#007f5f", "#2fc296"),
    "s3": ("#a8437f", "#e58cc0"),
    "s4": ("#946a00", "#e2b33c"),
    "s5": ("#2f8fc6", "#a5d8fa"),
    "s6": ("#5b4bb5", "#a99bf5"),
    "s7": ("#6b7078", "#b9bfc7"),
}
SERIES = tuple(role for role in COLOURS if role[1:].isdigit())


def chart_config(variables: bool = True) -> dict[str, Any]:
    """Returns Vega-Lite's `config`: in the page's CSS `variables`, or in the colours on white, for a PNG."""
    hue = {role: f"var(--{role})" if variables else on_white for role, (on_white, _) in COLOURS.items()}
    text = {"labelColor": hue["ink"], "titleColor": hue["pale"], "labelFontSize": 12, "titleFontSize": 12}
    text |= {"labelLimit": 0, "titleFontWeight": "normal"}
    above = {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": 0, "titleY": -12}
    return {
        "background": None if variables else hue["paper"],
        "font": "system-ui, sans-serif" if variables else "sans-serif",
        "axis": text | {"gridColor": hue["line"], "domainColor": hue["pale"], "tickColor": hue["pale"]},
        "axisX": {"grid": False, "labelFlush": False},
        "axisY": {"domain": False, "ticks": False} | above,
        "legend": text | {"orient": "top", "title": None, "offset": 28},
        "title": {"color": hue["ink"], "fontSize": 15, "anchor": "start", "offset": 12},
        "range": {"category": [hue[role] for role in SERIES]},
        "rule": {"color": hue["ink"]},
        "text": {"color": hue["ink"]},
        "view": {"stroke": None, "continuousHeight": 320, "discreteHeight": 320},
    }
