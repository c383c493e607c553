"""Summaries (`stats`) -> Altair charts, without colours for text and grid: those are in THEMES.

style.py       the two themes
labels.py      what cells, drafts and numbers are called
parts.py       what charts share
points.py      grid cells as points
picks.py       what a reader picks by legend and dropdown
curves.py      alpha and tau against stream length
maps.py        alpha as heatmaps: by length and precision, by the draft's and the target's length
controls.py    where SC costs acceptance: float and SC sides, and the controls
positions.py   acceptance by position in the block
categories.py  acceptance by category of prompt
prediction.py  measured against predicted tau
hardware.py    modelled speedup and energy, with sliders
quality.py     acceptance against the target's quality
frontier.py    modelled speedup against the target's quality
"""

from scspec.charts.categories import categories_chart
from scspec.charts.controls import controls_chart
from scspec.charts.curves import alpha_chart, tau_chart
from scspec.charts.frontier import frontier_chart
from scspec.charts.hardware import hardware_chart
from scspec.charts.labels import ARM_LABELS, decoding, draft_labels, interval_text, number, unscrambled
from scspec.charts.maps import length_map, precision_map
from scspec.charts.positions import positions_chart
from scspec.charts.prediction import prediction_chart
from scspec.charts.quality import quality_chart
from scspec.charts.style import THEMES

__all__ = [
    "ARM_LABELS",
    "THEMES",
    "alpha_chart",
    "categories_chart",
    "controls_chart",
    "decoding",
    "draft_labels",
    "frontier_chart",
    "hardware_chart",
    "interval_text",
    "length_map",
    "number",
    "positions_chart",
    "precision_map",
    "prediction_chart",
    "quality_chart",
    "tau_chart",
    "unscrambled",
]
