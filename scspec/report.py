"""Cells and a plan -> one offline HTML file, with the table of results as CSV and Parquet beside it.

The page holds its own JavaScript (Vega, once) and forbids itself every request, so it opens from a file share.
Text from prompts, models and files reaches it escaped: in HTML by the template, in JSON with < > & as \\u escapes.
Cells of different platforms (device, dtype, backend) share no chart, table or verdict.
Not covered: a page per pair or cell.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import vl_convert
from markupsafe import Markup

from scspec.charts import (
    ARM_LABELS,
    THEMES,
    alpha_chart,
    controls_chart,
    decoding,
    quality_chart,
    speedup_chart,
    tau_chart,
)
from scspec.hardware import modelled
from scspec.jobs import GRID_ARM
from scspec.results import (
    CONTINUATIONS,
    QUALITY_KEYS,
    QUALITY_SCHEMA,
    atomic_file,
    check_identities,
    read_cells,
    read_rows,
)
from scspec.stats import MIN_PROMPTS, NO_INTERVAL, PLATFORM_COLUMNS, summarise, summarise_quality
from scspec.tables import cell_tables, controls_of, quality_rows
from scspec.verdicts import BROKEN, HOLDS, audit_verdicts, identity_verdicts, platform_groups, platform_text

_QUALITY_COLUMNS = {  # of the summary -> of a target's quality
    **{name: name for name in ("perplexity", "float_perplexity", "quality_loss", "quality_loss_lo", "quality_loss_hi")},
    **{"target_tv": "tv", "target_kl": "kl"},
}


def build_report(cell_paths: Iterable[Path | str], plan: dict[str, Any], out_path: Path | str) -> pd.DataFrame:
    """Writes the report of the cells that exist, with its table beside it; returns the summary, a row per cell.

    `plan` has "cells" (at least "pair", "arm" and "path" each; those whose path does not exist are listed as missing)
    and "invalid" (at least "pair" and "reason" each, the rest as columns). Raises ValueError naming the file for a cell
    that cannot be read or was made with other settings than planned, or the block that violates a counter identity.
    """
    blocks, metadata = read_cells(path for path in map(Path, cell_paths) if path.exists())
    _check_settings(metadata, plan)
    check_identities(blocks)
    quality = _read_quality(plan)
    summary = _with_quality(modelled(summarise(blocks, metadata), metadata), quality, plan)
    page = _render(_page(blocks, summary, quality, list(metadata.values()), plan, Path(out_path)))
    write_table(summary, Path(out_path).with_suffix(""))
    with atomic_file(out_path) as file:
        file.write(page.encode())
    return summary


def _read_quality(plan: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """Return {path: a row per source} (`stats.summarise_quality`) of the quality files of a plan that exist."""
    planned = dict.fromkeys(cell.get("quality") for cell in plan["cells"])
    paths = [path for path in planned if path and Path(path).exists()]
    return {path: summarise_quality(read_rows(path, QUALITY_SCHEMA, QUALITY_KEYS)[0]) for path in paths}


def _with_quality(summary: pd.DataFrame, quality: dict[str, pd.DataFrame], plan: dict[str, Any]) -> pd.DataFrame:
    """Return a summary with its targets' quality on the continuations of the prompts, NaN where it is not known.

    A target in floating point is what the others are measured against: its quality_loss is 0.
    """
    planned = {cell.get("id"): cell.get("quality") for cell in plan["cells"]}
    rows = [quality.get(planned.get(cell_id)) for cell_id in summary["cell_id"]]
    found = [None if its is None else its[its["source"] == CONTINUATIONS].iloc[0] for its in rows]
    columns = {
        name: [float("nan") if row is None else float(row[source]) for row in found]
        for name, source in _QUALITY_COLUMNS.items()
    }
    summary = summary.assign(**columns)
    summary.loc[summary["target_stoc_len"].isna(), "quality_loss"] = 0.0
    return summary


def _check_settings(metadata: dict[str, dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise ValueError for a cell whose file was made with other settings than the plan's.

    Snakemake sees that itself, unless it was killed while the cell ran: then it has no record of the cell.
    """
    for planned in plan["cells"]:
        made = metadata.get(planned.get("id"), {}).get("cell", planned)
        if other := [name for name in made if made[name] != planned[name]]:
            path = planned["path"]
            raise ValueError(
                f"{path}: made with other settings than planned ({', '.join(other)}); again: snakemake -R {path}"
            )


def write_table(summary: pd.DataFrame, out_stem: Path | str) -> None:
    """Writes the summary as `out_stem`.csv and `out_stem`.parquet, one row per cell."""
    with atomic_file(f"{out_stem}.csv") as file:
        summary.to_csv(file, index=False)
    with atomic_file(f"{out_stem}.parquet") as file:
        pq.write_table(pa.Table.from_pandas(summary, preserve_index=False), file, compression="zstd")


def _render(page: dict[str, Any]) -> str:
    template = resources.files("scspec").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # charts are drawn in the order of the page
    vega = vl_convert.javascript_bundle(vl_version=".".join(alt.SCHEMA_VERSION.split(".")[:2]))
    # The bundle is not text from outside, but `</script` in one of its strings would end the element.
    vega = Markup(vega.replace("</script", "<\\/script"))
    return environment.from_string(template).render(page, vega=vega, themes=THEMES)


def _page(
    blocks: pd.DataFrame,
    summary: pd.DataFrame,
    quality: dict[str, pd.DataFrame],
    metadata: list[dict],
    plan: dict[str, Any],
    out_path: Path,
) -> dict[str, Any]:
    """Everything the template shows."""
    sections, control_charts = _sections(summary), _control_charts(summary)
    charts = [chart for section in sections for chart in section["charts"].values()] + control_charts
    specs = {chart["id"]: chart["spec"] for chart in charts}
    missing = [cell for cell in plan["cells"] if not Path(cell["path"]).exists()]
    verdicts = identity_verdicts(summary, [cell["pair"] for cell in plan["cells"]])
    audits = audit_verdicts(blocks, summary, plan)
    return {
        "specs": specs,
        "nonce": hashlib.sha256(json.dumps(specs).encode()).hexdigest(),
        "demonstration": plan["demonstration"],
        "alarms": _alarms(verdicts, audits, metadata),
        "platforms": _platforms(summary),
        "facts": _facts(blocks, summary, plan, missing, verdicts),
        "sections": sections,
        "control_charts": control_charts,
        "verdicts": verdicts,
        "audits": audits,
        "tables": cell_tables(summary),
        "quality": quality_rows(quality, plan),
        "stem": out_path.stem,
        "missing": missing,
        "arm_labels": ARM_LABELS,
        "invalid": plan["invalid"],
        "invalid_columns": _columns(plan["invalid"]),
        "provenance": _provenance(blocks, summary, metadata),
        "min_prompts": MIN_PROMPTS,
    }


def _columns(entries: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    return [*(name for name in names if name != "reason"), "reason"]


def _platforms(summary: pd.DataFrame) -> dict[str, int]:
    """What the cells were computed on -> how many of them."""
    counts = summary.groupby(list(PLATFORM_COLUMNS), sort=True).size()
    return {platform_text(*names): int(count) for names, count in counts.items()}


def _sections(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Charts of the grid: a section per pair, way of decoding and platform."""
    grid = summary[summary["arm"] == GRID_ARM]
    sections = []
    for index, ((pair, do_sample), platform, cells) in enumerate(platform_groups(grid, "pair", "do_sample")):
        bars = f"drafts are moved sideways a little to keep them apart, and {_bars(cells)}."
        charts = {
            "Acceptance": _chart(f"alpha-{index}", alpha_chart(cells), f"{_READ_ALPHA[do_sample]} {bars}"),
            "Block efficiency": _chart(f"tau-{index}", tau_chart(cells), f"{_READ_TAU} {bars}"),
        }
        if (costed := cells[cells["c"].notna()]).size:
            charts["Gain in hardware, modelled"] = _chart(
                f"speedup-{index}", speedup_chart(costed), f"{_READ_SPEEDUP} {bars}"
            )
        if (measured := cells[cells["quality_loss"].notna()]).size:
            charts["Quality beside acceptance"] = _chart(f"quality-{index}", quality_chart(measured), _READ_QUALITY)
        sections.append({"pair": pair, "decoding": decoding(do_sample), "platform": platform, "charts": charts})
    return sections


_READ_ALPHA = {
    False: "Each point is a cell: the share of emitted tokens on which draft and target choose the same token, so 1 "
    "means that the draft costs no acceptance;",
    True: "Each point is a cell: the overlap 1 - TV(p, q) of the target's and the draft's distributions, averaged over "
    "the emitted tokens, so 1 means that the draft costs no acceptance;",
}
_READ_TAU = (
    "Each point is a cell: the tokens that one pass of the target yields, from 1 (as without a draft) to the dashed "
    "line at gamma + 1 (every proposal accepted);"
)
_READ_SPEEDUP = (
    "Each point is a cell: how much faster its SC hardware would be than plain decoding at the same target length, LM "
    "heads left out; filled where the array holds all rows of a target pass at once, hollow where they take turns, "
    "which never gains; the dashed line is at 1;"
)
_READ_QUALITY = (
    "Each point is a cell, with its target's stoc_len beside it: far to the right SC has made the target a worse "
    "model, however well its draft agrees with it; perplexity is over the floating-point target's own continuations of "
    "the prompts."
)
_READ_CONTROLS = (
    "Identity must lie exactly on the mark at 1, reseed shows what two equally good SC models disagree by, and the "
    "float arms on which side SC costs acceptance;"
)


def _bars(cells: pd.DataFrame) -> str:
    if (cells["interval"] == NO_INTERVAL).all():
        return f"there are no intervals below {MIN_PROMPTS} prompts, so differences may be chance"
    return "bars are 95\u00a0% intervals over prompts"


def _chart(chart_id: str, chart: alt.TopLevelMixin, caption: str) -> dict[str, Any]:
    spec = chart.to_dict()
    del spec["config"]["view"], spec["$schema"]  # the theme has the frame; the page says the mode itself
    return {"id": chart_id, "spec": spec, "label": spec["description"], "caption": caption}


def _control_charts(summary: pd.DataFrame) -> list[dict[str, Any]]:
    controls = controls_of(summary)
    return [
        {
            **_chart(f"controls-{index}", controls_chart(cells), f"{_READ_CONTROLS} {_bars(cells)}."),
            **{"pair": pair, "decoding": decoding(do_sample), "platform": platform},
        }
        for index, ((pair, do_sample), platform, cells) in enumerate(platform_groups(controls, "pair", "do_sample"))
    ]


def _alarms(verdicts: list[dict[str, str]], audits: list[dict[str, str]], metadata: list[dict[str, Any]]) -> list[str]:
    alarms = [f"Audit of the replay: {its['verdict']}. {its['detail']}." for its in audits if its["verdict"] == BROKEN]
    alarms += [
        f"{its['pair']} ({its['platform']}): {its['verdict']}. {its['detail']}."
        for its in verdicts
        if its["verdict"] == BROKEN
    ]
    prompts = sorted({f"{its['prompts']['file']}, sha256 {its['prompts']['sha256']}" for its in metadata})
    if len(prompts) > 1:
        listed = "; ".join(prompts)
        alarms.append(f"The cells come from {len(prompts)} different prompt files, do not compare across: {listed}.")
    return alarms


def _facts(
    blocks: pd.DataFrame, summary: pd.DataFrame, plan: dict[str, Any], missing: Sequence, verdicts: Sequence
) -> list[tuple[str, str]]:
    """Label and value of what a reader wants to know first."""
    holding = sum(its["verdict"] == HOLDS for its in verdicts)
    each = "pairs" if len({its["pair"] for its in verdicts}) == len(verdicts) else "pairs and platforms"
    platforms = list(_platforms(summary))
    return [
        ("cells", f"{len(summary)} of {len(plan['cells'])}"),
        ("missing", str(len(missing))),
        ("impossible", str(len(plan["invalid"]))),
        ("prompts", str(blocks["prompt_id"].nunique())),
        ("tokens", f"{blocks['kept'].sum():,}"),
        ("decoding", ", ".join(sorted({decoding(value) for value in summary["do_sample"]})) or "none"),
        ("identity holds", f"{holding} of {len(verdicts)} {each}"),
        ("computed on", "; ".join(platforms) if len(platforms) == 1 else f"{len(platforms)} platforms"),
    ]


def _line(value: Any) -> str:
    """Metadata as one line of text, "key value, key value"; what is empty is left out."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {_line(item)}" for key, item in value.items() if item not in ("", None))


def _distinct(values: Iterable[Any]) -> list[str]:
    """The different lines of some metadata, in order."""
    return list(dict.fromkeys(line for line in map(_line, values) if line))


def _shares(summary: pd.DataFrame, metadata: list[dict[str, Any]]) -> list[str]:
    """The fraction of multiply-accumulates under SC: a line per pair and value, with the arms it holds for."""
    arms: dict[str, dict[str, None]] = {}
    for pair, arm, its in zip(summary["pair"], summary["arm"], metadata, strict=True):
        sides = ", ".join(f"{side} {share:.1%}" for side, share in its["sc_mac_share"].items())
        arms.setdefault(f"{pair}: {sides}", {})[arm] = None
    return [f"{line} ({', '.join(names)})" for line, names in arms.items()]


def _provenance(
    blocks: pd.DataFrame, summary: pd.DataFrame, metadata: list[dict[str, Any]]
) -> list[tuple[str, list[str]]]:
    """Label and lines; several lines mean that the cells differ, or a line for each model."""
    if not metadata:
        return []
    names = ("sampling_seed", "target_sc_seed", "draft_sc_seed")
    seeds = {name: sorted(summary[name].dropna().unique()) for name in names}
    started = _distinct(sorted(its["started_at"] for its in metadata))
    per_model = [(its["models"][side], its["weights_note"][side]) for its in metadata for side in its["models"]]
    models = [{key: value for key, value in model.items() if key != "note"} for model, _ in per_model]
    prompts = [{key: its["prompts"][key] for key in ("file", "sha256")} for its in metadata]
    return [
        ("Commit", _distinct(_commit(its) for its in metadata)),
        ("Versions", _distinct(its["versions"] for its in metadata)),
        ("Device, dtype, SC backend", [f"{name}: {count} cells" for name, count in _platforms(summary).items()]),
        ("Models", _distinct(models)),
        ("Weights", _distinct(note for _, note in per_model)),
        ("Share of multiply-accumulates in SC", _shares(summary, metadata)),
        ("Prompts", [f"{blocks['prompt_id'].nunique()} prompts", *_distinct(prompts)]),
        ("Token budget", _distinct(f"{its['cell']['max_new_tokens']} tokens a turn" for its in metadata)),
        ("Decoding", _distinct(_sampling(its["cell"]["sampling"]) for its in metadata)),
        ("Tokens", [f"{blocks['kept'].sum():,} in {len(blocks):,} blocks"]),
        ("Seeds", [f"{name}: {', '.join(map(str, values)) or 'none'}" for name, values in seeds.items()]),
        ("Started", [" to ".join(dict.fromkeys((started[0], started[-1])))]),
        ("Wall time", [f"{sum(its['wall_time_s'] or 0 for its in metadata):,.0f} s, summed over cells run as loops"]),
    ]


def _sampling(settings: dict[str, Any]) -> str:
    if not settings["do_sample"]:
        return "greedy: temperature, top_k and top_p have no effect"
    return "sampled, " + _line({name: settings[name] for name in ("temperature", "top_k", "top_p")})


def _commit(its: dict[str, Any]) -> str:
    if its["commit"] is None:
        return "unknown: not run from a git checkout"
    return f"{its['commit']}{', with uncommitted changes' if its['dirty'] else ''}"
