"""The Parquet file of a cell: one row per block (one target pass), written atomically and read strictly.

Nothing is aggregated here: `stats` derives every quantity from these rows. What a block is and what its counters must
satisfy is Seam 2 of docs/architecture.md; what the columns mean is in docs/results.md. A replayed cell of sampled text
has a row for each block that could be, with its expected number as `weight`; in all others every weight is 1.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scspec.config import LOOP, REPLAY

SCHEMA_VERSION = 2
METADATA_KEY = b"scspec"
METADATA_KEYS = frozenset(
    [
        *("schema_version", "cell", "versions", "commit", "dirty", "models", "prompts", "device", "backend"),
        *("sc_mac_share", "cost", "weights_note", "started_at", "wall_time_s"),
    ]
)

_SIDES = ("target", "draft")
# Null on a floating-point side; the grid point is null where no side is in SC, its length where the target is not.
SIDE_COLUMNS = tuple(f"{side}_{knob}" for knob in ("stoc_len", "sc_prec", "sc_seed") for side in _SIDES)
_TIMES = ("draft_time_s", "verify_time_s")  # null in a replayed cell
NULLABLE = frozenset(("stoc_len", "sc_prec", "sc_seed", *SIDE_COLUMNS, "stop", *_TIMES))


def _fields(names: Iterable[str], kind: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=name in NULLABLE) for name in names]


_KEY_FIELDS = [
    *_fields(("cell_id", "pair", "arm"), pa.string()),
    *_fields(("stoc_len", "sc_prec", "gamma", "sampling_seed", "sc_seed"), pa.int32()),
    *_fields(("target_model", "draft_model"), pa.string()),
    *_fields(SIDE_COLUMNS, pa.int32()),
    *_fields(("target_settings", "draft_settings", "device", "backend", "method"), pa.string()),
    *_fields(("do_sample",), pa.bool_()),
]
KEY_COLUMNS = tuple(field.name for field in _KEY_FIELDS)  # the same in every row of a cell

SCHEMA = pa.schema(
    [
        *_KEY_FIELDS,
        *_fields(("prompt_id", "category"), pa.string()),
        *_fields(("turn", "prompt_tokens", "block", "start"), pa.int32()),
        *_fields(("weight",), pa.float64()),
        *_fields(("proposed_ids", "emitted_ids"), pa.list_(pa.int32())),
        *_fields(("accepted", "kept"), pa.int32()),
        *_fields(("beta",), pa.list_(pa.float64())),
        *_fields(("margin",), pa.list_(pa.float32())),
        *_fields(("stop",), pa.string()),
        *_fields(_TIMES, pa.float64()),
    ]
)

#: The file of a target's quality, a row per text. `tokens` are scored; `nll`, `float_nll`: the negative log-likelihood
#: of the target in SC and in floating point, in nats; `tv`: total variation; `kl`: KL(float || SC), in nats; all summed
#: over the tokens.
QUALITY_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), False) for name in ("source", "text_id", "category")]
    + [pa.field("tokens", pa.int32(), False)]
    + [pa.field(name, pa.float64(), False) for name in ("nll", "float_nll", "tv", "kl")]
)
CONTINUATIONS, TEXT_FILE = "continuations", "text_file"  # a row's `source`
QUALITY_KEYS = METADATA_KEYS - {"cell"} | {"sources", "settings", "quality", "trajectory_file_sha256"}

NULLABLE_INTEGERS = {field.name: "Int32" for field in SCHEMA if field.nullable and field.type == pa.int32()}
#: List columns stay Arrow's: as a numpy array of every row they cost more than all that is done with them.
_LIST_DTYPES = {field.type: pd.ArrowDtype(field.type) for field in SCHEMA if pa.types.is_list(field.type)}


@contextmanager
def failures_name(path: Path | str) -> Iterator[None]:
    """Raises what the block raises; an OSError that names no file, as of a write to a full disk, gets `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file that appears under `path`, complete and synced, when the block ends without an error.

    Until then it lives in the same folder under a hidden, unique name; after an error nothing is left. An OSError
    names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(6)}.tmp"
    try:
        with failures_name(path), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_a(value: Any, kind: pa.DataType) -> bool:
    """Whether a Python or numpy value needs no conversion to be of `kind` (pyarrow itself cuts 1.5 to 1)."""
    if pa.types.is_list(kind):
        return isinstance(value, list | tuple | np.ndarray) and all(_is_a(v, kind.value_type) for v in value)
    if pa.types.is_boolean(kind):
        return isinstance(value, bool | np.bool_)
    if pa.types.is_integer(kind):
        return isinstance(value, Integral) and not isinstance(value, bool)
    if pa.types.is_floating(kind):
        return isinstance(value, Real) and not isinstance(value, bool)
    return isinstance(value, str)


def _check_row(index: int, row: dict[str, Any], schema: pa.Schema) -> None:
    unknown, missing = sorted(row.keys() - set(schema.names)), sorted(set(schema.names) - row.keys())
    if unknown or missing:
        raise ValueError(f"row {index}: unknown columns {unknown}, missing columns {missing}")
    for field in schema:
        value = row[field.name]
        if not (field.nullable if value is None else _is_a(value, field.type)):
            allowed = f"{field.type}{' or null' if field.nullable else ''}"
            raise ValueError(f"row {index}: {field.name} is {value!r}, allowed is {allowed}")


def _check_one_cell(rows: list[dict[str, Any]]) -> None:
    if not rows:
        raise ValueError("a cell has at least one block, got no rows")
    for name in KEY_COLUMNS:
        values = {row[name] for row in rows}
        if len(values) > 1:
            raise ValueError(f"a file holds one cell, but {name} has the values {sorted(values, key=str)}")


def write_cell(path: Path | str, rows: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
    """Writes one cell (a dict per block, columns of SCHEMA) and its JSON metadata, zstd-compressed, atomically.

    `metadata` holds METADATA_KEYS (`schema_version` is filled in) and may hold more. Raises ValueError for an
    unknown or missing column or metadata key, a value of another type, a null where none is allowed, or rows
    of more than one cell; then no file appears and an older one stays as it was.
    """
    write_rows(path, rows, metadata, SCHEMA, METADATA_KEYS, check=_check_one_cell)


def write_rows(
    path: Path | str,
    rows: list[dict[str, Any]],
    metadata: dict[str, Any],
    schema: pa.Schema,
    metadata_keys: Iterable[str],
    check: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> None:
    """`write_cell` for another schema and other metadata; `check` may refuse the rows as a whole."""
    for index, row in enumerate(rows):
        _check_row(index, row, schema)
    check(rows)
    metadata = {"schema_version": SCHEMA_VERSION, **metadata}
    if metadata["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {metadata['schema_version']!r}, this code writes {SCHEMA_VERSION}")
    if missing := sorted(set(metadata_keys) - metadata.keys()):
        raise ValueError(f"missing metadata keys {missing}")
    packed = {METADATA_KEY: json.dumps(metadata, allow_nan=False).encode()}
    table = pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(packed)
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def _read_metadata(path: Path | str, schema: pa.Schema, keys: Iterable[str]) -> dict[str, Any]:
    packed = (schema.metadata or {}).get(METADATA_KEY)
    if packed is None:
        raise ValueError(f"{path}: Parquet, but not written by scspec (no '{METADATA_KEY.decode()}' metadata)")
    metadata: dict[str, Any] = json.loads(packed)
    if metadata.get("schema_version") != SCHEMA_VERSION:
        found = metadata.get("schema_version")
        raise ValueError(f"{path}: schema_version is {found!r}, this code reads {SCHEMA_VERSION}")
    if missing := sorted(set(keys) - metadata.keys()):
        raise ValueError(f"{path}: missing metadata keys {missing}")
    return metadata


def _check_columns(path: Path | str, found_schema: pa.Schema, schema: pa.Schema) -> None:
    if missing := [name for name in schema.names if name not in found_schema.names]:
        raise ValueError(f"{path}: missing columns {missing}")
    if unknown := [name for name in found_schema.names if name not in schema.names]:
        raise ValueError(f"{path}: unknown columns {unknown}")
    for field in schema:
        if (found := found_schema.field(field.name)) != field:
            raise ValueError(f"{path}: column {field.name} is {found.type}, expected {field.type}")


def read_cell(path: Path | str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Returns (blocks: one row per block; metadata) of one cell file.

    List columns are Arrow's (`padded`, `list_lengths`); integer columns that may hold nulls are pandas' Int32. Raises
    FileNotFoundError, or a one-line ValueError naming the file if it is torn, foreign, of another schema version, or
    lacks a column.
    """
    table, metadata = _read_table(path, SCHEMA, METADATA_KEYS)
    return _blocks(table), metadata


def read_rows(path: Path | str, schema: pa.Schema, metadata_keys: Iterable[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`read_cell` for another schema and other metadata; list columns as numpy arrays."""
    table, metadata = _read_table(path, schema, metadata_keys)
    return table.to_pandas(), metadata


def _read_table(path: Path | str, schema: pa.Schema, metadata_keys: Iterable[str]) -> tuple[pa.Table, dict[str, Any]]:
    try:
        # ParquetFile, not read_table: that one reads `key=value` folders in the path as columns.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if getattr(error, "errno", None):  # the system's fault, such as no file or no permission, and not the file's
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable Parquet file ({reason})") from error
    metadata = _read_metadata(path, table.schema, metadata_keys)
    _check_columns(path, table.schema, schema)
    return table.select(schema.names).cast(schema), metadata  # Parquet has a name of its own for what lists hold


def _blocks(table: pa.Table) -> pd.DataFrame:
    return table.to_pandas(types_mapper=_LIST_DTYPES.get).astype(NULLABLE_INTEGERS)


def read_cells(paths: Iterable[Path | str]) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Returns (the blocks of all cells, cell_id -> metadata); no paths give an empty table with all columns."""
    tables, metadata = [SCHEMA.empty_table()], {}
    for path in paths:
        table, its_metadata = _read_table(path, SCHEMA, METADATA_KEYS)
        cell_id = table["cell_id"][0].as_py()
        if cell_id in metadata:
            raise ValueError(f"{path}: cell_id {cell_id!r} was already read from another file")
        tables.append(table)
        metadata[cell_id] = its_metadata
    return _blocks(pa.concat_tables(tables).combine_chunks()), metadata  # else every use of a column joins its chunks


def _arrow(lists: pd.Series) -> pa.ListArray:
    found = pa.array(lists, from_pandas=False)  # NaN in a list is no null
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def list_lengths(lists: pd.Series) -> np.ndarray:
    """Returns how many values each list of a list column has."""
    lengths: np.ndarray = pc.list_value_length(_arrow(lists)).to_numpy()
    return lengths


def padded(lists: pd.Series, fill: float) -> np.ndarray:
    """Returns a list column as a matrix (rows, longest list), the rest of each row `fill`."""
    lengths = list_lengths(lists)
    present = np.arange(lengths.max()) < lengths[:, None]
    values = _arrow(lists).flatten().to_numpy()
    matrix = np.full(present.shape, fill, dtype=values.dtype)
    matrix[present] = values
    return matrix


def _expected(blocks: pd.DataFrame) -> np.ndarray:
    """Whether each block is one that could be, with its expected number as `weight`: a replayed sampled one."""
    expected: np.ndarray = ((blocks["method"] == REPLAY) & blocks["do_sample"]).to_numpy()
    return expected


def _block_faults(blocks: pd.DataFrame) -> dict[str, np.ndarray]:
    """What can be wrong with a block in itself (Seam 2) -> (rows,) whether it is."""
    gamma, accepted, kept = (blocks[name].to_numpy() for name in ("gamma", "accepted", "kept"))
    emitted = list_lengths(blocks["emitted_ids"])
    stop, weight = blocks["stop"].astype(object), blocks["weight"].to_numpy()
    proposed, replayed = list_lengths(blocks["proposed_ids"]), (blocks["method"] == REPLAY).to_numpy()
    return {
        "method is not 'loop' or 'replay'": ~blocks["method"].isin([LOOP, REPLAY]).to_numpy(),
        "weight is not 1, or of a replayed sampled block in 0..1": (
            np.where(_expected(blocks), ~((weight > 0) & (weight <= 1)), weight != 1)
        ),
        "proposed_ids does not hold gamma tokens": ~replayed & (proposed != gamma),
        "proposed_ids does not end with or before the first rejected proposal": (
            replayed & ((proposed < accepted) | (proposed > np.minimum(gamma, accepted + 1)))
        ),
        "times are not null where replayed and given elsewhere": (
            blocks[list(_TIMES)].isna().to_numpy() != replayed[:, None]
        ).any(axis=1),
        "accepted is outside 0..gamma": (accepted < 0) | (accepted > gamma),
        "emitted_ids holds not 1..accepted + 1 tokens": (emitted < 1) | (emitted > accepted + 1),
        "beta and margin do not have one value per emitted token": (
            (list_lengths(blocks["beta"]) != emitted) | (list_lengths(blocks["margin"]) != emitted)
        ),
        "stop is not null, 'eos' or 'budget'": ~(stop.isna() | stop.isin(["eos", "budget"])).to_numpy(),
        "fewer than accepted + 1 tokens are emitted without a stop": ((emitted <= accepted) & stop.isna().to_numpy()),
        "kept is outside 1..len(emitted_ids)": (kept < 1) | (kept > emitted),
        "fewer tokens are kept than emitted, but stop is not 'budget'": (
            (kept < emitted) & (stop != "budget").to_numpy()
        ),
    }


def _content_faults(blocks: pd.DataFrame) -> dict[str, np.ndarray]:
    """As `_block_faults`, for the values in the lists, once their lengths are right."""
    gamma, accepted = (blocks[name].to_numpy()[:, None] for name in ("gamma", "accepted"))
    proposed = padded(blocks["proposed_ids"], -1)
    emitted = padded(blocks["emitted_ids"], -1)[:, : proposed.shape[1]]
    beta = padded(blocks["beta"], np.nan)
    index = np.arange(beta.shape[1])
    greedy, present = ~blocks["do_sample"].to_numpy()[:, None], ~np.isnan(beta)
    expected = np.where(index < accepted, 1.0, 0.0)  # of a greedy block, up to its first rejected proposal
    known = greedy & present & (index <= accepted) & (index < gamma)
    copied = (index < accepted) & present
    width = emitted.shape[1]
    return {
        "emitted_ids does not begin with the accepted proposals": (
            (emitted != proposed[:, :width]) & copied[:, :width]
        ).any(axis=1),
        # 1e-5: p and q may be float32, whose sum over a vocabulary is 1 only to about 1e-6
        "beta is outside 0..1": ((beta < -1e-5) | (beta > 1)).any(axis=1),
        "beta is NaN": present.sum(axis=1) != list_lengths(blocks["beta"]),
        "greedy, but beta is not 1 where accepted and 0 where rejected": (known & (beta != expected)).any(axis=1),
    }


def _sequence_faults(blocks: pd.DataFrame, texts: np.ndarray) -> dict[str, np.ndarray]:
    """What can be wrong between a block and the next one of the same text; `blocks` in order, `texts` their numbers."""
    following = np.append(blocks["start"].to_numpy()[1:], 0)
    last = np.ones(len(blocks), dtype=bool)
    last[:-1] = np.diff(texts) != 0
    stopped = blocks["stop"].notna().to_numpy()
    end = blocks["start"].to_numpy() + list_lengths(blocks["emitted_ids"])
    counted = ~_expected(blocks)
    return {
        "the last block of a prompt has no stop": counted & last & ~stopped,
        "stop is set, but another block follows": counted & ~last & stopped,
        "the next block does not start where this one ends": (counted & ~last & (following != end)),
        "its text is not expected to end once": _endings(blocks, texts, stopped),
    }


def _endings(blocks: pd.DataFrame, texts: np.ndarray, stopped: np.ndarray) -> np.ndarray:
    """Whether a replayed sampled text's expected number of last blocks is not 1.

    1e-9: it is a sum of products of probabilities, in float64, over at most a few thousand blocks.
    """
    ended = np.bincount(texts, np.where(stopped, blocks["weight"], 0.0))[texts]
    wrong: np.ndarray = _expected(blocks) & (np.abs(ended - 1) > 1e-9)
    return wrong


def check_identities(blocks: pd.DataFrame) -> None:
    """Returns nothing; raises ValueError with the first block that violates a counter identity of Seam 2."""
    texts = blocks.groupby(["cell_id", "prompt_id", "turn"], sort=False).ngroup().to_numpy()
    order = np.lexsort((blocks["block"], texts))
    if (order != np.arange(len(blocks))).any():  # a file has its blocks in order
        blocks, texts = blocks.take(order), texts[order]
    blocks = blocks.reset_index(drop=True)
    for faults_of in (_block_faults, _content_faults, partial(_sequence_faults, texts=texts)):
        for fault, wrong in faults_of(blocks).items() if len(blocks) else ():
            if wrong.any():
                row = blocks.loc[int(wrong.argmax()), SCHEMA.names[len(KEY_COLUMNS) :]].to_dict()
                cell_id = blocks["cell_id"].iloc[int(wrong.argmax())]
                raise ValueError(f"{cell_id}: {fault}, in {row}")
