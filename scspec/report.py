"""Cells and a plan -> one offline HTML file, with the table of results as CSV and Parquet beside it.

The page holds its own JavaScript (Vega, once) and forbids itself every request, so it opens from a file share.
Text from prompts, models and files reaches it escaped: in HTML by the template, in JSON with < > & as \\u escapes.
Cells of different platforms (device, dtype, backend) share no chart, table or verdict.
Not covered: a page per pair or cell.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
    draft_labels,
    interval_text,
    number,
    quality_chart,
    speedup_chart,
    tau_chart,
)
from scspec.config import REPLAY
from scspec.hardware import modelled
from scspec.jobs import AUDIT_ARM, GRID_ARM
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

IDENTITY = "identity"
HOLDS, BROKEN, NOT_RUN, SAMPLED = "holds", "BROKEN: the run is broken", "not run", "sampled: other texts"
_AUDITED = ["prompt_id", "turn", "block", "start", "emitted_ids", "accepted", "kept", "beta", "margin", "stop"]
_QUALITY_COLUMNS = {  # of the summary -> of a target's quality
    **{name: name for name in ("perplexity", "float_perplexity", "quality_loss", "quality_loss_lo", "quality_loss_hi")},
    **{"target_tv": "tv", "target_kl": "kl"},
}
_TABLE_ORDER = ["rank", "sc_prec", "gamma", "stoc_len", "draft_stoc_len", "sc_seed", "sampling_seed"]


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
        "tables": _tables(summary),
        "quality": _quality_rows(quality, plan),
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


def _platform(device_name: str, dtype: str, backend: str) -> str:
    return f"{device_name}, {dtype}, backend {backend}"


def _platforms(summary: pd.DataFrame) -> dict[str, int]:
    """What the cells were computed on -> how many of them."""
    counts = summary.groupby(list(PLATFORM_COLUMNS), sort=True).size()
    return {_platform(*names): int(count) for names, count in counts.items()}


def _groups(summary: pd.DataFrame, *names: str) -> Iterator[tuple[tuple, str, pd.DataFrame]]:
    """Yields (values of the columns, platform, cells): cells that may stand in one chart or table."""
    for values, cells in summary.groupby([*names, *PLATFORM_COLUMNS], sort=True):
        yield values[: len(names)], _platform(*values[len(names) :]), cells


def _sections(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Charts of the grid: a section per pair, way of decoding and platform."""
    grid = summary[summary["arm"] == GRID_ARM]
    sections = []
    for index, ((pair, do_sample), platform, cells) in enumerate(_groups(grid, "pair", "do_sample")):
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


def _controls(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[~summary["arm"].isin([GRID_ARM, AUDIT_ARM])]


def _control_charts(summary: pd.DataFrame) -> list[dict[str, Any]]:
    controls = _controls(summary)
    return [
        {
            **_chart(f"controls-{index}", controls_chart(cells), f"{_READ_CONTROLS} {_bars(cells)}."),
            **{"pair": pair, "decoding": decoding(do_sample), "platform": platform},
        }
        for index, ((pair, do_sample), platform, cells) in enumerate(_groups(controls, "pair", "do_sample"))
    ]


def identity_verdicts(summary: pd.DataFrame, pairs: Iterable[str] = ()) -> list[dict[str, str]]:
    """Per pair and platform, whether its `identity` cells hold: beta exactly 1 everywhere, every proposal accepted.

    A pair that is in `pairs` only has a verdict too, with no platform.
    """
    verdicts = [
        {"pair": pair, "platform": platform, **_identity_verdict(cells[cells["arm"] == IDENTITY])}
        for (pair,), platform, cells in _groups(summary, "pair")
    ]
    without_cells = [pair for pair in dict.fromkeys(pairs) if pair not in set(summary["pair"])]
    nothing = _identity_verdict(summary.iloc[:0])
    return verdicts + [{"pair": pair, "platform": "", **nothing} for pair in without_cells]


def _identity_verdict(cells: pd.DataFrame) -> dict[str, str]:
    broken = cells[(cells["beta_min"] != 1) | (cells["acceptance_rate"] != 1)]
    if cells.empty:
        return {"verdict": NOT_RUN, "detail": "no identity cell: nothing shows that the run is exact"}
    if broken.empty:
        return {"verdict": HOLDS, "detail": f"alpha is exactly 1 over {cells['tokens'].sum():,} tokens"}
    worst = broken.loc[broken["alpha"].idxmin()]
    return {"verdict": BROKEN, "detail": f"alpha is {number(worst['alpha'])} in {worst['cell_id']}, and must be 1"}


def audit_verdicts(blocks: pd.DataFrame, summary: pd.DataFrame, plan: dict[str, Any]) -> list[dict[str, str]]:
    """Of a replayed plan, whether the cell that was run as a loop too has the blocks that its replay derived.

    Greedy blocks must be equal, one by one. Sampled ones are of another text: their tau is shown beside the expected.
    """
    return [
        {"cell": audit["id"], **_audit_verdict(blocks, summary, audit["id"], _replay_of(audit, plan["cells"])["id"])}
        for audit in plan["cells"]
        if audit["arm"] == AUDIT_ARM
    ]


def _replay_of(audit: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    own = ("id", "arm", "method", "path")
    same = [cell for cell in cells if all(cell[name] == audit[name] for name in audit if name not in own)]
    return next(cell for cell in same if cell["method"] == REPLAY)


def _audit_verdict(blocks: pd.DataFrame, summary: pd.DataFrame, loop_id: str, replay_id: str) -> dict[str, str]:
    loop, replay = (blocks[blocks["cell_id"] == cell_id] for cell_id in (loop_id, replay_id))
    if loop.empty or replay.empty:
        return {"verdict": NOT_RUN, "detail": f"needs {loop_id} and {replay_id}"}
    if loop["do_sample"].iloc[0]:
        taus = summary.set_index("cell_id")["tau"]
        return {"verdict": SAMPLED, "detail": f"tau {number(taus[loop_id])}, expected {number(taus[replay_id])}"}
    texts = [its[_AUDITED].map(str).reset_index(drop=True) for its in (loop, replay)]
    if texts[0].equals(texts[1]):
        return {"verdict": HOLDS, "detail": f"{len(loop):,} blocks are equal to the loop's"}
    return {"verdict": BROKEN, "detail": f"{replay_id} has other blocks than the loop {loop_id}"}


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


def _tables(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """A table of text per pair, way of decoding and platform, for the grid and for the controls."""
    tables = []
    for arms, cells in (
        ("grid", summary[summary["arm"] == GRID_ARM]),
        ("controls", _controls(summary)),
    ):
        for (pair, do_sample), platform, group in _groups(cells, "pair", "do_sample"):
            group = group.assign(rank=group["arm"].map(list(ARM_LABELS).index)).sort_values(_TABLE_ORDER)
            first = dict(zip(group["cell_id"], draft_labels(group), strict=True)) if arms == "grid" else None
            rows = [_row(cell, first) for cell in group.itertuples()]
            tables.append({"title": f"{pair}, {decoding(do_sample)}: {arms}", "platform": platform, "rows": rows})
    return tables


def _quality_rows(quality: dict[str, pd.DataFrame], plan: dict[str, Any]) -> list[dict[str, str]]:
    """A row of text per target setting and source of text."""
    targets = {cell["quality"]: cell["target"] for cell in plan["cells"] if cell.get("quality") in quality}
    rows = []
    for path, target in targets.items():
        for source in quality[path].itertuples():
            rows.append(
                {
                    "target": target["model"],
                    **{name: str(target["sc"][f"sc_{name}"]) for name in ("stoc_len", "prec", "seed")},
                    "text": source.source.replace("_", " "),
                    "tokens": f"{source.tokens:,}",
                    **{name: number(getattr(source, name)) for name in ("perplexity", "float_perplexity")},
                    "rise": f"{source.quality_loss:+.2%}",
                    "rise, 95\u00a0%": _rise_interval(source),
                    "TV": number(source.tv),
                    "KL (nats)": number(source.kl),
                }
            )
    return rows


def _rise_interval(source: Any) -> str:
    if source.quality_loss_interval == NO_INTERVAL:
        return NO_INTERVAL
    return f"{source.quality_loss_lo:+.2%} to {source.quality_loss_hi:+.2%}"


def _row(cell: Any, drafts: dict[str, str] | None) -> dict[str, str]:
    def whole(value: Any, missing: str) -> str:
        return missing if pd.isna(value) else str(value)

    def interval(name: str, kind: str) -> str:
        text = interval_text(*(getattr(cell, column) for column in (name, f"{name}_lo", f"{name}_hi")), kind)
        return NO_INTERVAL if kind == NO_INTERVAL else text

    seeds = (cell.sampling_seed, cell.target_sc_seed, cell.draft_sc_seed)
    return {
        **({"arm": ARM_LABELS[cell.arm]} if drafts is None else {"draft's streams": drafts[cell.cell_id]}),
        "stoc_len target / draft": f"{whole(cell.target_stoc_len, 'float')} / {whole(cell.draft_stoc_len, 'float')}",
        "sc_prec": whole(cell.sc_prec, "float"),
        "gamma": str(cell.gamma),
        "seeds": " / ".join(whole(seed, "-") for seed in seeds),
        "prompts": str(cell.prompts),
        "alpha": number(cell.alpha),
        "alpha, 95\u00a0%": interval("alpha", cell.interval),
        "tau": number(cell.tau),
        "tau, 95\u00a0%": interval("tau", cell.tau_interval),
        "tau predicted": number(cell.predicted_tau),
        "alpha evaluated": number(cell.alpha_evaluated),
        "acceptance rate": number(cell.acceptance_rate),
        "speedup, rows at once": _known(cell.speedup_at_once, "{:.3f}"),
        "speedup, row after row": _known(cell.speedup_in_turn, "{:.3f}"),
        "energy": _known(cell.energy_ratio, "{:.3f}"),
        "target's perplexity": _known(cell.perplexity, "{:.3f}"),
        "its rise": _known(cell.quality_loss, "{:+.1%}"),
        "tokens": f"{cell.tokens:,}",
        "tokens/s": _known(cell.tokens_per_s, "{:.1f}"),
    }


def _known(value: float, text: str) -> str:
    return "-" if pd.isna(value) else text.format(value)


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
