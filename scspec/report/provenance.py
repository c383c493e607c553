"""Where the numbers of a report come from, as labelled lines of text."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from scspec.report.run import Run, platforms


def provenance(run: Run) -> list[tuple[str, list[str]]]:
    """Label and lines; several lines mean that the cells differ, or a line for each model."""
    metadata = list(run.metadata.values())
    if not metadata:
        return []
    names = ("sampling_seed", "target_sc_seed", "draft_sc_seed")
    seeds = {name: sorted(run.summary[name].dropna().unique()) for name in names}
    started = distinct(sorted(its["started_at"] for its in metadata))
    per_model = [(its["models"][side], its["weights_note"][side]) for its in metadata for side in its["models"]]
    models = [{key: value for key, value in model.items() if key != "note"} for model, _ in per_model]
    prompts = [{key: its["prompts"][key] for key in ("file", "sha256")} for its in metadata]
    return [
        ("Commit", distinct(_commit(its) for its in metadata)),
        ("Versions", distinct(its["versions"] for its in metadata)),
        ("Device, dtype, SC backend", [f"{name}: {count} cells" for name, count in platforms(run.summary).items()]),
        ("Models", distinct(models)),
        ("Weights", distinct(note for _, note in per_model)),
        ("Share of multiply-accumulates in SC", _shares(run.summary, metadata)),
        ("Streams", _streams(run.summary)),
        ("Prompts", [f"{run.blocks['prompt_id'].nunique()} prompts", *distinct(prompts)]),
        (
            "Token budget",
            distinct(f"{its['cell']['max_new_tokens']} tokens a turn, unless a prompt has its own" for its in metadata),
        ),
        ("Decoding", distinct(_sampling(its["cell"]["sampling"]) for its in metadata)),
        ("Tokens", [f"{run.blocks['kept'].sum():,} in {len(run.blocks):,} blocks"]),
        ("Seeds", [f"{name}: {', '.join(map(str, values)) or 'none'}" for name, values in seeds.items()]),
        ("Started", [" to ".join(dict.fromkeys((started[0], started[-1])))]),
        ("Wall time", [f"{sum(its['wall_time_s'] or 0 for its in metadata):,.0f} s, summed over cells run as loops"]),
    ]


def distinct(values: Iterable[Any]) -> list[str]:
    """The different lines of some metadata, in order."""
    return list(dict.fromkeys(line for line in map(_line, values) if line))


def _line(value: Any) -> str:
    """Metadata as one line of text, "key value, key value"; what is empty is left out."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {_line(item)}" for key, item in value.items() if item not in ("", None))


def _shares(summary: pd.DataFrame, metadata: list[dict[str, Any]]) -> list[str]:
    """The fraction of multiply-accumulates under SC: a line per pair and value, with the arms it holds for."""
    arms: dict[str, dict[str, None]] = {}
    for pair, arm, its in zip(summary["pair"], summary["arm"], metadata, strict=True):
        sides = ", ".join(f"{side} {share:.1%}" for side, share in its["sc_mac_share"].items())
        arms.setdefault(f"{pair}: {sides}", {})[arm] = None
    return [f"{line} ({', '.join(names)})" for line, names in arms.items()]


def _streams(summary: pd.DataFrame) -> list[str]:
    """The lengths on both sides, which are the clock cycles that a product takes: nothing shortens them further."""
    return [
        f"{side}: {', '.join(str(int(length)) for length in sorted(lengths))} clock cycles a product"
        for side in ("target", "draft")
        if len(lengths := summary[f"{side}_stoc_len"].dropna().unique())
    ]


def _sampling(settings: dict[str, Any]) -> str:
    if not settings["do_sample"]:
        return "greedy: temperature, top_k and top_p have no effect"
    return "sampled, " + _line({name: settings[name] for name in ("temperature", "top_k", "top_p")})


def _commit(its: dict[str, Any]) -> str:
    if its["commit"] is None:
        return "unknown: not run from a git checkout"
    return f"{its['commit']}{', with uncommitted changes' if its['dirty'] else ''}"
