"""Writes docs/config.md: every setting of config.yaml, from workflow/config.schema.yaml.

    python docs/config_reference.py

A setting's `title` says what it is, its `description` what is allowed. The defaults of the SC knobs are code's
(`scspec.sc.knobs`), all others the schema's. A test compares the file with what this writes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scspec.config import SCHEMA_PATH
from scspec.sc.knobs import SC_CONFIG_DEFAULTS

OUTPUT = Path(__file__).with_name("config.md")
PAIR = "pairs.NAME"

INTRODUCTION = """\
# config.yaml

Written by `python docs/config_reference.py` from `workflow/config.schema.yaml`; edit that.

Every setting has a default but those marked *needed*. An unknown key is an error at every level. A list is an axis of
the grid: a cell for each combination. `snakemake --cores all --config KEY=VALUE` sets a top-level key for one run,
and `--configfile FILE` lays a file over `config.yaml`: a pair that is only in `config.yaml` stays.

Allowed alone but not together, and refused before anything runs:

- no pair with `enabled: true`;
- several values of `sampling_seed` with `do_sample: false`: they would repeat the same tokens;
- a `backend` or a `dtype` that the `device` does not have: `cpu` has backend `cpu` and `float32`, `cuda` has backends
  `cuda` and `triton` and all three dtypes;
- `gpus` or `cells_per_gpu` above 1 with `device: cpu`;
- `sc_mode: unipolar` in attention with `sc_granularity` `causal` (the default) or `per_head`;
- `method: replay` with `batch_invariant: false`, or with another scope than `sc_granularity: causal` and
  `sc_linear_granularity: per_row`: replay needs rows that depend on nothing after them.

Combinations of the grid that cannot exist, such as a `stoc_len` above `2**sc_prec`, are no error: `scspec plan` and
the report list them, and they are not run.
"""

NOTES = {
    f"{PAIR}.draft": "`model`, `skip_layers` and `sc` are as those of the target; a draft has these too.",
    f"{PAIR}.target.sc": "The defaults are those without a preset; `published` has `sc_granularity: per_row` and\n"
    "`batch_invariant: false` instead, `float` no SC at all. `stoc_len`, `sc_prec` and `sc_seed` of a side come from\n"
    "the grid. What the knobs mean to the bit: [method.md](method.md).",
}


def reference() -> str:
    """Return the text of docs/config.md."""
    schema = yaml.safe_load(SCHEMA_PATH.read_text(encoding="utf-8"))
    parts = [INTRODUCTION]
    for path, node in sections(schema):
        parts.append("\n".join([f"## {path or 'Top level'}", "", *_note(path), *_table(path, node), ""]))
    return "\n".join(parts)


def sections(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted path, node) of every mapping with named keys, a parent before its children."""
    if "properties" in schema:
        yield path, schema
    for name, node in schema.get("properties", {}).items():
        if name == "sc" and path == f"{PAIR}.draft":
            continue  # the target's
        yield from sections(node, f"{path}.{name}".removeprefix("."))
    if path == "pairs":
        yield from sections(schema["additionalProperties"], PAIR)


def _note(path: str) -> list[str]:
    return [NOTES[path], ""] if path in NOTES else []


def _table(path: str, node: dict[str, Any]) -> list[str]:
    """The lines of a table, a row per key; of a draft, the keys that a target has not."""
    shared = ("model", "skip_layers", "sc") if path == f"{PAIR}.draft" else ()
    rows = ["| key | what it is | allowed | default |", "|---|---|---|---|"]
    for name, sub in node["properties"].items():
        if name not in shared:
            texts = (_escaped(sub["title"]), _escaped(sub["description"]))
            rows.append(f"| `{name}` | {' | '.join(texts)} | {_default(path, name, node, sub)} |")
    return rows


def _escaped(text: str) -> str:
    """The text with what Markdown would read as markup marked as plain."""
    return re.sub(r"([*|])", r"\\\1", text)


def _default(path: str, name: str, node: dict[str, Any], sub: dict[str, Any]) -> str:
    if name in node.get("required", ()):
        return "*needed*"
    if path.endswith(".sc"):
        return f"`{json.dumps(SC_CONFIG_DEFAULTS[name])}`" if name in SC_CONFIG_DEFAULTS else "none"
    if sub.get("default") == {} and "properties" in sub:
        return "the defaults of its keys"
    return f"`{json.dumps(sub['default'])}`"


if __name__ == "__main__":
    OUTPUT.write_text(reference(), encoding="utf-8")
