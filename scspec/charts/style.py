"""Colours of charts on a light and on a dark page, one of which the page picks when it draws."""

# Okabe & Ito 2008, without yellow and black; lightened for the dark page. Every hue has contrast >= 3 on its page.
_PALETTES = {
    "light": ["#0072B2", "#D55E00", "#008F68", "#B0558A", "#7A6A00", "#2F8FC4"],
    "dark": ["#56B4E9", "#F0884A", "#2FC99B", "#E39AC6", "#E0C742", "#9CC9EE"],
}
# viridis from dark to bright, as far as it stands out from the page: contrast >= 3.
_ORDINAL = {"light": [0, 0.58], "dark": [0.35, 1]}
_INKS = {"light": ("#1c2430", "#5b6675", "#e2e6eb"), "dark": ("#e6eaf0", "#a3adba", "#333b46")}


def _theme(name: str) -> dict:
    ink, muted, grid = _INKS[name]
    text = {"labelColor": muted, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 12}
    text["titleFontWeight"] = "normal"
    return {
        "background": None,
        "font": "system-ui, -apple-system, 'Segoe UI', sans-serif",
        "axis": {
            **text,
            "gridColor": grid,
            "domainColor": muted,
            "tickColor": muted,
            "titlePadding": 8,
            "labelFlush": False,  # or the labels of the two ends leave their ticks
        },
        "legend": {
            **text,
            "labelColor": ink,
            "labelLimit": 320,
            "symbolFillColor": muted,
            "symbolOpacity": 1,
            "layout": {"top": {"margin": 20}},  # between two legends
        },
        "header": {**text, "labelColor": ink, "labelFontSize": 12, "labelFontWeight": "bold"},
        "view": {"stroke": grid},
        "line": {"color": muted},
        "rule": {"color": muted},
        "tick": {"color": ink},
        "text": {"color": muted},
        "range": {"category": _PALETTES[name], "ordinal": {"scheme": "viridis", "extent": _ORDINAL[name]}},
    }


THEMES = {name: _theme(name) for name in _PALETTES}  # Vega-Lite configurations
