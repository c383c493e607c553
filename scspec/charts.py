"""Summaries (`stats.summarise`) -> Altair charts, without colours for text and grid: those are in THEMES, one of
which the page picks when it draws.

Not covered: heatmaps, acceptance by position or category.
"""

import json
from collections.abc import Iterable
from fractions import Fraction
from math import ceil

import altair as alt
import pandas as pd

from scspec.jobs import AUDIT_ARM, GRID_ARM
from scspec.stats import MIN_PROMPTS, NO_INTERVAL, ONE_SIDED, PLATFORM_COLUMNS

# Okabe & Ito 2008, without yellow and black; lightened for the dark page. Every hue has contrast >= 3 on its page.
_PALETTES = {
    "light": ["#0072B2", "#D55E00", "#008F68", "#B0558A", "#7A6A00", "#2F8FC4"],
    "dark": ["#56B4E9", "#F0884A", "#2FC99B", "#E39AC6", "#E0C742", "#9CC9EE"],
}
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
        },
        "header": {**text, "labelColor": ink, "labelFontSize": 12, "labelFontWeight": "bold"},
        "view": {"stroke": grid},
        "rule": {"color": muted},
        "tick": {"color": ink},
        "text": {"color": muted},
        "range": {"category": _PALETTES[name]},
    }


THEMES = {name: _theme(name) for name in _PALETTES}  # Vega-Lite configurations

ARM_LABELS = {
    GRID_ARM: "SC target, SC draft",
    "identity": "identity: draft = target",
    "reseed": "reseed: independent streams",
    "float_float": "float target, float draft",
    "sc_float": "SC target, float draft",
    "float_sc": "float target, SC draft",
    AUDIT_ARM: "audit of the replay: a loop",
}
IDENTITY_ALPHA = 1.0


def number(value: float) -> str:
    """Three decimals, but more where they would show 0 or 1 for a number that is neither."""
    shown = f"{value:.3f}"
    if pd.isna(value):
        return "undefined"
    if float(shown) in (0, 1) and value not in (0, 1):
        return f"{value:.1e}" if value < 0.5 else f"1 - {1 - value:.1e}"
    return shown


def interval_text(estimate: float, low: float, high: float, kind: str) -> str:
    """A 95 % interval in words: "0.310 to 0.460", "at least 0.830", "none (fewer than 8 prompts)"."""
    if kind == NO_INTERVAL:
        return f"none (fewer than {MIN_PROMPTS} prompts)"
    if kind == ONE_SIDED:
        return f"at least {low:.3f}" if estimate == high else f"at most {high:.3f}"
    return f"{low:.3f} to {high:.3f}"


def _ratio_label(draft: int, target: int) -> str:
    return "same length" if draft == target else f"{Fraction(int(draft), int(target))} as long"


def _streams(cells: pd.DataFrame) -> list[str]:
    """The draft's streams: by ratio to the target's, or by length if that takes fewer labels."""
    sides = list(zip(cells["draft_stoc_len"], cells["target_stoc_len"], strict=True))
    fixed = ["float" if pd.isna(draft) else f"{draft} cycles" for draft, _ in sides]
    if cells[["draft_stoc_len", "target_stoc_len"]].isna().any(axis=None):
        return fixed
    ratios = [_ratio_label(draft, target) for draft, target in sides]
    return fixed if len(set(fixed)) < len(set(ratios)) else ratios


def draft_labels(cells: pd.DataFrame) -> list[str]:
    """What sets each draft of one pair apart: its streams, its precision if not the target's, its skipped layers."""
    labels = []
    for streams, row in zip(_streams(cells), cells.itertuples(), strict=True):
        parts = [streams]
        if pd.notna(row.draft_sc_prec) and pd.notna(row.target_sc_prec) and row.draft_sc_prec != row.target_sc_prec:
            parts.append(f"{row.draft_sc_prec} bit")
        if skipped := json.loads(row.draft_settings).get("skip_layers"):
            parts.append(f"{len(skipped)} layers skipped")
        labels.append(", ".join([*parts, *_modules_labels(row)]))
    return labels


def _modules_labels(cell) -> list[str]:
    """Which modules have streams of their own, and of which side if not of both alike: "*.mlp.* 64 cycles 6 bit"."""
    target, draft = (json.loads(text).get("sc_modules") for text in (cell.target_settings, cell.draft_settings))
    sides = {"": target} if target == draft else {"target's ": target, "draft's ": draft}
    texts = {"sc_stoc_len": "{} cycles", "sc_prec": "{} bit"}
    return [
        " ".join([f"{side}{pattern}", *(text.format(own[name]) for name, text in texts.items() if name in own)])
        for side, modules in sides.items()
        for pattern, own in (modules or {}).items()
    ]


def unscrambled(cells: pd.DataFrame) -> pd.Series:
    """Where the target's streams are the bare Sobol sequence: stoc_len = 2**sc_prec, without halving (DESIGN 4)."""
    halved = cells["target_settings"].map(lambda text: json.loads(text).get("sc_halve_bipolar", False))
    whole = cells["target_stoc_len"] == 2 ** cells["target_sc_prec"]
    return whole.fillna(False).astype(bool) & ~halved.astype(bool)


def _records(table: pd.DataFrame) -> list[dict]:
    return json.loads(table.to_json(orient="records", double_precision=15))


_TOOLTIP = [
    alt.Tooltip("target_stoc_len:Q", title="target stoc_len (cycles)"),
    alt.Tooltip("draft_stoc_len:Q", title="draft stoc_len (cycles)"),
    alt.Tooltip("sc_prec:Q", title="sc_prec (bits)"),
    alt.Tooltip("gamma:Q", title="gamma"),
    alt.Tooltip("alpha:Q", title="alpha", format=".4f"),
    alt.Tooltip("alpha_interval:N", title="alpha, 95 % interval"),
    alt.Tooltip("tau:Q", title="tau (tokens per target pass)", format=".3f"),
    alt.Tooltip("tau_interval_text:N", title="tau, 95 % interval"),
    alt.Tooltip("predicted_tau:Q", title="tau predicted from alpha", format=".3f"),
    alt.Tooltip("prompts:Q", title="prompts"),
    alt.Tooltip("tokens:Q", title="tokens", format=","),
    alt.Tooltip("cell_id:N", title="cell"),
]
_TOOLTIP_FIELDS = [tooltip.shorthand.split(":")[0] for tooltip in _TOOLTIP]


def _with_texts(cells: pd.DataFrame) -> pd.DataFrame:
    def texts(name: str, kind: str) -> list[str]:
        columns = cells[[name, f"{name}_lo", f"{name}_hi", kind]]
        return [interval_text(*row) for row in columns.itertuples(index=False)]

    return cells.assign(alpha_interval=texts("alpha", "interval"), tau_interval_text=texts("tau", "tau_interval"))


def _one_kind(cells: pd.DataFrame) -> None:
    for name in ("pair", "do_sample", *PLATFORM_COLUMNS):
        if cells[name].nunique() != 1:
            raise ValueError(f"a chart is of one {name}, got {sorted(cells[name].unique())}")


_DODGE_OCTAVES = 0.045  # between neighbouring drafts, so that their intervals stay apart; below the marker's width
_SCRAMBLED, _UNSCRAMBLED = "scrambled", "not scrambled (stoc_len = 2^sc_prec)"


def _curve_table(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Returns (a row per point, the drafts in the order of the legend, the panels in their order)."""
    cells = _with_texts(cells).assign(draft=draft_labels(cells))
    several_prec = cells["sc_prec"].nunique() > 1
    cells = cells.sort_values(["sc_prec", "gamma", "stoc_len", "draft_stoc_len"], ascending=[True, True, True, False])
    precision = cells["sc_prec"].map(lambda bits: f"sc_prec {bits}, " if several_prec else "")
    cells["panel"] = precision + cells["gamma"].map("gamma = {}".format)
    drafts = list(dict.fromkeys(cells["draft"]))
    shift = cells["draft"].map(drafts.index) - (len(drafts) - 1) / 2
    cells["x"] = cells["stoc_len"].astype(float) * 2.0 ** (_DODGE_OCTAVES * shift)
    cells["streams"] = unscrambled(cells).map({True: _UNSCRAMBLED, False: _SCRAMBLED})
    # One line never joins cells that differ in more than the length.
    cells["curve"] = cells[["draft", "sampling_seed", "sc_seed"]].astype(str).agg("|".join, axis=1)
    cells["ceiling"] = cells["gamma"] + 1
    return cells, drafts, list(dict.fromkeys(cells["panel"]))


def _x_axis(stoc_lens: list[int]) -> alt.X:
    margin = 2**0.3
    return alt.X(
        "x:Q",
        title="target stoc_len (clock cycles, log scale)",
        scale=alt.Scale(type="log", base=2, domain=[stoc_lens[0] / margin, stoc_lens[-1] * margin], nice=False),
        axis=alt.Axis(values=stoc_lens, format="d", grid=False, labelOverlap="greedy"),
    )


def _curve_layers(table: pd.DataFrame, drafts: list[str], quantity: str, interval: str, y: dict) -> list[alt.Chart]:
    """Points, and lines and bars for the cells that have intervals."""
    color = alt.Color("draft:N", title="draft's streams", sort=drafts, scale=alt.Scale(domain=drafts))
    shape = alt.Shape(
        "streams:N",
        title="target's streams",
        scale=alt.Scale(domain=[_SCRAMBLED, _UNSCRAMBLED], range=["circle", "diamond"]),
        legend=alt.Legend() if (table["streams"] == _UNSCRAMBLED).any() else None,
    )
    lengths = sorted(int(length) for length in table["stoc_len"].unique())
    base = alt.Chart().encode(x=_x_axis(lengths), y=alt.Y(f"{quantity}:Q", **y), color=color)
    points = base.mark_point(filled=True, size=75, opacity=1).encode(shape=shape, tooltip=_TOOLTIP)
    if (table[interval] == NO_INTERVAL).all():
        return [points]
    known = base.transform_filter(alt.datum[interval] != NO_INTERVAL)
    lines = known.mark_line(strokeWidth=1.2, opacity=0.6).encode(detail="curve:N")
    bars = known.mark_rule(strokeWidth=2).encode(y=alt.Y(f"{quantity}_lo:Q", **y), y2=f"{quantity}_hi:Q")
    return [lines, bars, points]


def _curves(
    cells: pd.DataFrame, quantity: str, interval: str, y: dict, *references: alt.Chart, more: Iterable[str] = ()
) -> alt.FacetChart:
    """`quantity` per length with its bounds, a colour per draft, a panel per gamma; `references` behind, which may need
    `more` columns."""
    _one_kind(cells)
    table, drafts, panels = _curve_table(cells)
    layers = _curve_layers(table, drafts, quantity, interval, y)
    gammas = table["gamma"].nunique()
    columns = ceil(gammas / ceil(gammas / 4))  # at most four, and rows as equal as they can be
    layered = alt.layer(*references, *layers).properties(width=290 if columns < 4 else 235, height=240)
    fields = {*_TOOLTIP_FIELDS, "x", "draft", "streams", "curve", "panel", "ceiling", interval}
    fields |= {quantity, f"{quantity}_lo", f"{quantity}_hi", *more}
    data = alt.InlineData(values=_records(table[sorted(fields)]))
    facet = alt.Facet("panel:N", sort=panels, header=alt.Header(title=None))
    chart = layered.facet(facet, columns=columns, data=data)
    return chart.configure_legend(orient="top", direction="horizontal", columns=3)


def alpha_chart(cells: pd.DataFrame) -> alt.FacetChart:
    """alpha against the target's stoc_len with 95 % intervals, from summary rows of one pair, arm sc_sc, greedy or
    sampled. Raises ValueError if pairs, platforms (PLATFORM_COLUMNS), or greedy and sampled cells are mixed."""
    y = {"title": _alpha_title(cells), "scale": alt.Scale(domain=[0, 1])}
    return _curves(cells, "alpha", "interval", y).properties(description=_description("Acceptance alpha", cells))


def tau_chart(cells: pd.DataFrame) -> alt.FacetChart:
    """tau against the target's stoc_len, as `alpha_chart`; dashed: gamma + 1, where every proposal is accepted."""
    y = {
        "title": "tau (tokens per target pass)",
        "scale": alt.Scale(domain=[1, int(cells["gamma"].max()) + 1]),
    }
    ceiling = alt.Chart().mark_rule(strokeDash=[5, 4], strokeWidth=1).encode(y=alt.Y("max(ceiling):Q", **y))
    return _curves(cells, "tau", "tau_interval", y, ceiling).properties(
        description=_description("Block efficiency tau", cells)
    )


_HARDWARE = {
    "speedup_at_once": "modelled speedup, all rows at once",
    "speedup_in_turn": "modelled speedup, row after row",
    "energy_ratio": "modelled energy per token",
    "c": "c (a draft token in target tokens)",
}


def speedup_chart(cells: pd.DataFrame) -> alt.FacetChart:
    """The modelled speedups over plain decoding at the same target length, from summary rows (`hardware.modelled`) of
    one pair, as `alpha_chart`: filled where the array holds all rows at once, hollow where they take turns; the line is
    at 1, where speculation gains nothing. Intervals are tau's."""
    per_tau = cells["speedup_at_once"] / cells["tau"]
    scaled = {f"speedup_at_once_{end}": per_tau * cells[f"tau_{end}"] for end in ("lo", "hi")}
    y = {"title": "speedup over plain decoding", "scale": alt.Scale(zero=True)}
    even = alt.Chart().mark_rule(strokeDash=[5, 4], strokeWidth=1).encode(y=alt.datum(1, **y))
    lengths = sorted(int(length) for length in cells["stoc_len"].unique())
    tooltip = [*_TOOLTIP, *(alt.Tooltip(f"{name}:Q", title=title, format=".3f") for name, title in _HARDWARE.items())]
    in_turn = alt.Chart().mark_point(filled=False, size=55, shape="triangle-down", strokeWidth=1.5)
    in_turn = in_turn.encode(x=_x_axis(lengths), y=alt.Y("speedup_in_turn:Q", **y), color="draft:N", tooltip=tooltip)
    chart = _curves(cells.assign(**scaled), "speedup_at_once", "tau_interval", y, even, in_turn, more=_HARDWARE)
    return chart.properties(description=_description("Modelled speedup", cells))


def quality_chart(cells: pd.DataFrame) -> alt.LayerChart:
    """alpha against what SC costs the target, quality_loss, from summary rows of one pair whose targets' quality is
    known; each point says its target's stoc_len. Raises ValueError as `alpha_chart` does."""
    _one_kind(cells)
    table, drafts, _ = _curve_table(cells)
    tooltip = [*_TOOLTIP, alt.Tooltip("quality_loss:Q", title="rise of the target's perplexity", format=".1%")]
    tooltip += [alt.Tooltip(f"{name}:Q", title=name.replace("_", " "), format=".3f") for name in _QUALITY]
    title = "rise of the target's perplexity over its floating point"
    x = alt.X("quality_loss:Q", title=title, axis=alt.Axis(format="%"))
    y = alt.Y("alpha:Q", title=_alpha_title(cells), scale=alt.Scale(domain=[0, 1]))
    color = alt.Color("draft:N", title="draft's streams", sort=drafts, scale=alt.Scale(domain=drafts))
    base = alt.Chart().encode(x=x, y=y)
    points = base.mark_circle(size=75, opacity=1).encode(color=color, tooltip=tooltip)
    labels = base.mark_text(dx=9, align="left", fontSize=10).encode(text="target_stoc_len:N")
    fields = sorted({*_TOOLTIP_FIELDS, "draft", "quality_loss", *_QUALITY})
    chart = alt.layer(points, labels, data=alt.InlineData(values=_records(table[fields])))
    chart = chart.properties(width=520, height=260).configure_legend(orient="top", direction="horizontal", columns=3)
    return chart.properties(description=f"Acceptance alpha against the target's quality, {_subject(cells)}")


_QUALITY = ("perplexity", "float_perplexity", "target_tv", "target_kl")


def _alpha_title(cells: pd.DataFrame) -> str:
    """What alpha is: two different quantities (DESIGN 4), so a chart holds one of them."""
    return f"alpha ({'mean overlap' if cells['do_sample'].iloc[0] else 'agreement'} per emitted token)"


def decoding(do_sample: bool) -> str:
    """How a cell was decoded, in a word: "sampled" or "greedy"."""
    return "sampled" if do_sample else "greedy"


def _description(quantity: str, cells: pd.DataFrame) -> str:
    return f"{quantity} against the target's stream length, {_subject(cells)}, a panel per gamma"


def _subject(cells: pd.DataFrame) -> str:
    return f"pair {cells['pair'].iloc[0]}, {decoding(cells['do_sample'].iloc[0])} decoding"


_SETTINGS = {  # column -> how a control's label says it, where controls differ in it
    "length": "{} cycles",
    "sc_prec": "{} bit",
    "gamma": "gamma {}",
    "sampling_seed": "sampling_seed {}",
    "sc_seed": "sc_seed {}",
}


def _controls_table(cells: pd.DataFrame) -> pd.DataFrame:
    """With a `label` per row of the chart: the arm, and those of its settings in which the controls differ."""
    table = _with_texts(cells).assign(length=cells["target_stoc_len"].fillna(cells["draft_stoc_len"]))
    table["label"] = table["arm"].map(ARM_LABELS)
    for name, text in _SETTINGS.items():
        if table[name].nunique() > 1:
            table["label"] += ["" if pd.isna(value) else f", {text.format(int(value))}" for value in table[name]]
    table["expected"] = table["arm"].map({"identity": IDENTITY_ALPHA})
    table["rank"] = table["arm"].map(list(ARM_LABELS).index)
    return table.sort_values(["rank", *_SETTINGS])


def controls_chart(cells: pd.DataFrame) -> alt.LayerChart:
    """alpha of the control arms, with a tick where `identity` must lie; from summary rows of one pair, arms other than
    sc_sc. Raises ValueError if pairs, platforms (PLATFORM_COLUMNS), or greedy and sampled cells are mixed."""
    _one_kind(cells)
    table = _controls_table(cells)
    y = alt.Y(
        "label:N",
        title=None,
        sort=list(dict.fromkeys(table["label"])),
        axis=alt.Axis(labelLimit=400, grid=True),
    )
    x = alt.X("alpha:Q", title=_alpha_title(cells), scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=10))
    color = alt.Color("measured:N", legend=None)
    base = alt.Chart().encode(y=y).transform_calculate(measured="'measured'")
    layers = [
        base.transform_filter("datum.expected !== null").mark_tick(thickness=3, size=22).encode(x="expected:Q"),
        # identity is exact or broken, not an estimate: no interval
        base.transform_filter(f"datum.interval !== '{NO_INTERVAL}' && datum.expected === null")
        .mark_rule(strokeWidth=2)
        .encode(x="alpha_lo:Q", x2="alpha_hi:Q", color=color),
        base.mark_circle(size=75, opacity=1).encode(x=x, color=color, tooltip=_TOOLTIP),
    ]
    columns = [*_TOOLTIP_FIELDS, "label", "expected", "interval", "alpha_lo", "alpha_hi"]
    chart = alt.layer(*layers, data=alt.InlineData(values=_records(table[columns])))
    description = f"Acceptance alpha of the controls, {_subject(cells)}"
    return chart.properties(width=330, height=alt.Step(28), description=description)
