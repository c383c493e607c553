"""What a job is: a frozen dataclass, one canonical line of JSON, one Parquet file.

A line says everything the job needs and nothing else, because Snakemake compares it to decide what is stale: settings
of the report and of the machine (thread count) are not in it.

Not covered: which jobs an experiment has (`scspec.cells`); doing them (`scspec.run`, `replay`, `quality`). Imports no
torch.
"""

import hashlib
import json
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from scspec.config import Sampling

GRID_ARM = "sc_sc"
AUDIT_ARM = "audit"  # one cell of a replayed grid, drawn at random, as a loop
PAST_END_STEP = 8  # trajectories go on past their end by a multiple of it: they do not depend on gamma up to 8

#: Positions that a teacher-forced pass scores at once: as many rows of logits are held.
POSITIONS_PER_PASS = 64


@dataclass(frozen=True)
class Side:
    """Target or draft of a cell, resolved. `sc` is None in floating point.

    Otherwise `sc` holds the overrides that the pair gives and `sc_prec`, `sc_stoc_len`, `sc_seed`; every other knob
    has its default in `scspec.patching`.
    """

    model: str
    sc: dict[str, Any] | None = field(hash=False)
    skip_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))  # JSON has lists

    @property
    def streams(self) -> str:
        """Name its streams, for example `L128_p8_n0`, or `float`."""
        if self.sc is None:
            return "float"
        return f"L{self.sc['sc_stoc_len']}_p{self.sc['sc_prec']}_n{self.sc['sc_seed']}"


class Job:
    """What jobs have in common. A subclass is a frozen dataclass; its files lie in `folder` of the results.

    `id` names the job, and its file; `sides` are those whose models it needs.
    """

    folder: ClassVar[str]
    if TYPE_CHECKING:  # a property of most jobs and a field of Cell, whose default a property here would be
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

        @property
        def id(self) -> str: ...
        @property
        def sides(self) -> tuple[Side, ...]: ...

    def to_json(self) -> str:
        """Return the one canonical line: sorted keys, no spaces, ASCII."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what a line says. Raises `ValueError` if it is not JSON or its keys are not the dataclass's."""
        name = cls.__name__.lower()
        try:
            job: Self = _built(cls, json.loads(text), name)
        except json.JSONDecodeError as error:
            needed = f"the line that {cls.__name__}.to_json returns"
            raise ValueError(f"{name}: not JSON: {error}; needed: {needed}") from None
        return job

    def digest(self) -> str:
        """Return the beginning of the line's SHA-256."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def path(self, results_dir: str | Path = "results") -> Path:
        """Return where its Parquet file lies."""
        return Path(results_dir) / self.folder / f"{self.id}.parquet"

    def manifests(self, results_dir: str | Path = "results") -> list[Path]:
        """Return where the manifests of its models lie, each once."""
        stems = sorted({manifest_name(side.model) for side in self.sides})
        return [Path(results_dir) / "models" / f"{stem}.json" for stem in stems]


@dataclass(frozen=True)
class Trajectory(Job):
    """A target's own text after each prompt, shared by all replayed cells of that target: no draft, no gamma.

    Each text goes on for `past_end` tokens past its end, as the last block of a cell may.
    """

    folder = "trajectories"

    target: Side
    sampling_seed: int
    prompt_file: str
    prompt_sha256: str
    prompt_limit: int | None
    max_new_tokens: int
    past_end: int
    sampling: Sampling
    device: str
    dtype: str
    backend: str

    @property
    def id(self) -> str:
        """Name it for a reader, and by a hash of all its settings."""
        return f"{manifest_name(self.target.model)}/{self.target.streams}_s{self.sampling_seed}-{self.digest()}"

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return the target."""
        return (self.target,)


@dataclass(frozen=True)
class _OnTexts(Job):
    """A job on the texts of a trajectory, on its device."""

    trajectory: Trajectory

    @property
    def device(self) -> str:
        """Return what it is computed on: what its texts were."""
        return self.trajectory.device


@dataclass(frozen=True)
class Predictions(_OnTexts):
    """What a draft predicts at each position of a trajectory."""

    folder = "predictions"

    draft: Side

    @property
    def id(self) -> str:
        """Name it for a reader, and by a hash of all its settings."""
        return f"{self.trajectory.id}/{manifest_name(self.draft.model)}_{self.draft.streams}-{self.digest()}"

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return the target, whose distributions sampled texts ask for, and the draft."""
        return self.trajectory.target, self.draft


@dataclass(frozen=True)
class Quality(_OnTexts):
    """How well a target in SC predicts a text: that of the same target in floating point, and a text file if named."""

    folder = "quality"

    target: Side
    text_file: str | None
    text_sha256: str | None

    @property
    def id(self) -> str:
        """Name it for a reader, and by a hash of all its settings."""
        return f"{manifest_name(self.target.model)}/{self.target.streams}-{self.digest()}"

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return the target; in floating point it is the same model."""
        return (self.target,)


@dataclass(frozen=True)
class Cell(Job):
    """One run over a prompt file. `method` is "loop" (draft and target take turns) or "replay" (see `predictions`).

    `stoc_len` is the target's, None if the target is in floating point. `sc_prec` and `sc_seed` are the target's, or
    the draft's if only the draft is in SC, or None. So a cell that does not depend on an axis of the grid does not
    name a value of it either. What each side resolves to is in `target.sc` and `draft.sc`.
    """

    folder = "cells"

    id: str
    pair: str
    arm: str
    stoc_len: int | None
    sc_prec: int | None
    gamma: int
    sc_seed: int | None
    sampling_seed: int
    target: Side
    draft: Side
    prompt_file: str
    prompt_sha256: str
    prompt_limit: int | None
    max_new_tokens: int
    sampling: Sampling
    device: str
    dtype: str
    backend: str
    method: str

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return target and draft."""
        return self.target, self.draft

    def predictions(self) -> Predictions:
        """Return what a replayed cell derives from. Cells that differ in gamma share it, nearly always."""
        return Predictions(self.trajectory(past_end=-(-self.gamma // PAST_END_STEP) * PAST_END_STEP), self.draft)

    def trajectory(self, *, past_end: int) -> Trajectory:
        """Return the target's own texts of the cell's prompts."""
        shared = {item.name: getattr(self, item.name) for item in fields(Trajectory) if item.name != "past_end"}
        return Trajectory(past_end=past_end, **shared)


def manifest_name(model: str) -> str:
    """Return a model's name as a file name stem: `/` becomes `--`."""
    return model.replace("/", "--")


def _checked_keys(kind: type, values: Any, where: str) -> dict[str, Any]:
    """Return the mapping if its keys are the fields of a dataclass; else raises `ValueError`."""
    wanted = {item.name for item in fields(kind)}
    if not isinstance(values, dict) or set(values) != wanted:
        wrong = sorted(wanted ^ set(values)) if isinstance(values, dict) else values
        raise ValueError(f"{where}: wrong or missing keys {wrong}; needed: {', '.join(sorted(wanted))}")
    return values


def _built(kind: type, values: Any, where: str) -> Any:
    """Return the dataclass that a mapping describes, with the dataclasses in it."""
    values = _checked_keys(kind, values, where)
    for item in fields(kind):
        if isinstance(item.type, type) and is_dataclass(item.type):
            values[item.name] = _built(item.type, values[item.name], item.name)
    return kind(**values)
