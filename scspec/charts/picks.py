"""What a reader picks, and the colours to pick by: a draft by its legend entry, one value of a column by a dropdown."""

import altair as alt
import pandas as pd

#: The same in every chart, so that a page can carry a pick from one to the others (their data set draft_pick_store).
DRAFT_PICK = "draft_pick"
_FADED = 0.12  # of what is drawn in full


def draft_pick() -> alt.Parameter:
    """Drafts picked by clicks on their legend entries, more with shift; none picked means all."""
    return alt.selection_point(name=DRAFT_PICK, fields=["draft"], bind="legend")


def faded(pick: alt.Parameter, opacity: float = 1) -> dict:
    """`opacity` for the picked drafts, next to nothing for the others."""
    return alt.condition(pick, alt.value(opacity), alt.value(opacity * _FADED))


def draft_color(drafts: list[str]) -> alt.Color:
    """A colour per draft, in the order of the legend."""
    # Without a property of its own the legend of several layers is that of the first, which hears no clicks unless the
    # pick is that layer's, and is as faint as its marks.
    scale, legend = alt.Scale(domain=drafts), alt.Legend(symbolOpacity=1)
    return alt.Color("draft:N", title="draft's streams", sort=drafts, scale=scale, legend=legend)


def length_color(lengths: list[int]) -> alt.Color:
    """A shade per target length, from the theme's ordinal range."""
    scale, legend = alt.Scale(domain=lengths), alt.Legend(columns=len(lengths))
    return alt.Color("target_stoc_len:O", title="target stoc_len (cycles)", scale=scale, legend=legend)


def _options(values: pd.Series) -> list[int] | list[str]:
    if pd.api.types.is_numeric_dtype(values):
        return sorted((int(value) for value in values.unique()), reverse=True)
    return values.drop_duplicates().tolist()


def dropdowns(table: pd.DataFrame, labels: dict[str, str]) -> dict[str, alt.Parameter]:
    """A dropdown for each of these columns (`labels`: column -> what stands beside it) that has several values.

    The first option is picked: of numbers the largest, of texts that of the first row.
    """
    options = {column: _options(table[column]) for column in labels}
    return {
        column: alt.param(
            name=f"{column}_choice",
            bind=alt.binding_select(options=options[column], name=f"{label} "),
            value=options[column][0],
        )
        for column, label in labels.items()
        if len(options[column]) > 1
    }


def picked(picks: dict[str, alt.Parameter]) -> dict[str, list]:
    """The properties of a chart that has these dropdowns, and shows those rows that they pick."""
    return {"params": [pick.param for pick in picks.values()], "transform": filters(picks)} if picks else {}


def filters(picks: dict[str, alt.Parameter]) -> list[alt.FilterTransform]:
    """What leaves those rows that the dropdowns pick."""
    return [alt.FilterTransform(filter=alt.datum[column] == pick) for column, pick in picks.items()]
