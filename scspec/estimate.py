"""What an experiment would cost before it is submitted: tokens to decode, and hours of a device, by pair.

An estimate, not a measurement: blocks follow from an alpha that the user names, a turn uses its whole budget, and a
pass takes what `RATES` says of its layers, weights and multiply-accumulates (MACs, `hardware`). Stream length does not
enter: the simulator looks up as much whatever it is (benchmarks/LOG.md).

Not covered: waiting for a queue or for other work on the device; fetching models; the cells that replay derives, which
take seconds. Imports no torch and fetches nothing: of a model it reads config.json alone.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scspec.aliases import folder_here
from scspec.cells import expand, qualities
from scspec.config import LOOP, REPLAY, Experiment, load_experiment
from scspec.hardware import macs_per_token
from scspec.jobs import POSITIONS_PER_PASS, Cell, Predictions, Quality, Side, Trajectory
from scspec.prompt_rows import Prompt
from scspec.prompts import load_prompts
from scspec.stats import predicted_tau

#: SmolLM2's tokenizer on prompts/bench48.jsonl makes 4.2 characters a token; chat templates add some 30 tokens.
CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS = 4, 30


@dataclass(frozen=True)
class Rates:
    """Seconds of a GPU, or of a core of the CPU. `start`: of a job without its models; `pack`: of a weight of these.

    A pass takes `layer` for each layer, `weight` for each weight of a linear, and `mac` for each MAC of each row.
    """

    start: float
    pack: float
    layer: float
    weight: float
    mac: float


#: By backend. A backend without rates has no estimate.
RATES = {
    # benchmarks/LOG.md, 2026-11-28, SmolLM2-135M (134.5 M weights) on one thread of a busy two-core machine, an EPYC of
    # 2026-11-24 took a third. Of 512 tokens, a plain decode 61.3 s, teacher-forced 23.2 s: 74 ms a pass and 22 ms a
    # row. The start of a process 15 s, two models packed 5 s. It reproduces a default cell's 35 s.
    "cpu": Rates(start=15, pack=19e-9, layer=0, weight=0.55e-9, mac=0.157e-9),
    # benchmarks/LOG.md, 2026-11-28, one H100, float16: forwards of 1B and 8B shapes, 1 row 1.94 and 6.34 ms, 16 x 5
    # rows 13.0 and 68.7 ms. It reproduces the speculative rates there to 15 %, 16 prompts of SmolLM2 to 30 %. Start and
    # packing are the CPU's and none: no GPU's have been measured.
    "cuda": Rates(start=15, pack=0, layer=83e-6, weight=0.386e-12, mac=0.107e-12),
}


@dataclass(frozen=True)
class PairEstimate:
    """What the jobs of a pair cost that no pair before it shares; `hours` is None where `unknown` says why."""

    pair: str
    jobs: int
    tokens: int
    hours: float | None
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class _Passes:
    """How often the model of a side runs, and over how many rows (tokens) in all."""

    side: Side
    passes: float
    rows: float


Job = Cell | Trajectory | Predictions | Quality


class Estimator:
    """Costs of the jobs of one experiment. alpha: how likely a proposal is accepted, 0..1, the same everywhere.

    Raises ValueError for another alpha, and what `load_prompts` raises.
    """

    def __init__(self, experiment: Experiment, alpha: float):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}: must be from 0 to 1")
        self.experiment, self.alpha, self.budget = experiment, alpha, experiment.max_new_tokens
        self.rates, self._config = RATES.get(experiment.backend), cache(_config)
        prompts = load_prompts(experiment.prompt_file)[: experiment.prompt_limit]
        self.turns = sum(len(prompt.turns) for prompt in prompts)
        self.slots = min(experiment.prompts_per_batch, len(prompts))
        self.prompt_rows = sum(_prompt_rows(prompt, self.budget) for prompt in prompts)

    def by_pair(self, cells: Iterable[Cell], quality: dict[str, Quality]) -> list[PairEstimate]:
        """Return the estimate of each pair; a job that pairs share counts for the first that needs it."""
        jobs: dict[Path, tuple[str, Job]] = {}
        for cell in cells:
            for job in _jobs_of(cell, quality):
                jobs.setdefault(job.path(), (cell.pair, job))
        pairs = dict.fromkeys(cell.pair for cell in cells)
        return [self._pair(pair, [job for owner, job in jobs.values() if owner == pair]) for pair in pairs]

    def _pair(self, pair: str, jobs: list[Job]) -> PairEstimate:
        absent = sorted({side.model for job in jobs for side in job.sides if self._shape(side) is None})
        unknown = [f"{model} is not on this machine; fetch it: scspec models fetch {model}" for model in absent]
        if self.rates is None:
            unknown.append(f"no rates of backend {self.experiment.backend} have been measured")
        tokens = self.turns * self.budget * sum(isinstance(job, Cell | Trajectory) for job in jobs)
        hours = None
        if self.rates is not None and not unknown:
            hours = sum(self._seconds(job, self.rates) for job in jobs) * self.experiment.gpus / 3600
        return PairEstimate(pair, len(jobs), tokens, hours, tuple(unknown))

    def _shape(self, side: Side) -> SimpleNamespace | None:
        """Return the sizes of a side's model, without the layers it leaves out; None where they are not known here."""
        config = self._config(side.model)
        if config is None:
            return None
        return SimpleNamespace(**{**config, "num_hidden_layers": config["num_hidden_layers"] - len(side.skip_layers)})

    def _seconds(self, job: Job, rates: Rates) -> float:
        return rates.start + sum(self._seconds_of(work, rates) for work in self._work(job))

    def _seconds_of(self, work: _Passes, rates: Rates) -> float:
        shape = self._shape(work.side)
        assert shape is not None  # else the hours of its pair are unknown
        macs, layers = macs_per_token(shape), int(shape.num_hidden_layers)
        weights = macs["linear"] + macs["lm_head"]
        a_pass = layers * rates.layer + weights * rates.weight
        return weights * rates.pack + work.passes * a_pass + work.rows * sum(macs.values()) * rates.mac

    def _work(self, job: Job) -> list[_Passes]:
        if isinstance(job, Cell):
            return self._loop(job)
        if isinstance(job, Trajectory):
            tokens = self.turns * (self.budget + job.past_end)
            return [_Passes(job.target, self.turns + tokens / self.slots, self.prompt_rows + tokens)]
        if isinstance(job, Quality):
            windows = _window_tokens(job.text_file)
            return [self._scored(side, self.budget, windows) for side in (job.target, job.trajectory.target)]
        sides = job.sides if job.trajectory.sampling.do_sample else (job.draft,)
        return [self._scored(side, self.budget + job.trajectory.past_end, 0) for side in sides]

    def _loop(self, cell: Cell) -> list[_Passes]:
        tau = float(predicted_tau(1.0 if cell.arm == "identity" else self.alpha, cell.gamma))
        blocks = self.turns * math.ceil(self.budget / tau)
        target = _Passes(cell.target, self.turns + blocks / self.slots, self.prompt_rows + blocks * (cell.gamma + 1))
        drafted = blocks * cell.gamma
        return [target, _Passes(cell.draft, self.turns + drafted / self.slots, self.prompt_rows + drafted)]

    def _scored(self, side: Side, tokens: int, windows: float) -> _Passes:
        """Return the teacher-forced passes over so many tokens of each turn, and over tokens of a text in windows."""
        passes = self.turns * (1 + math.ceil(tokens / POSITIONS_PER_PASS)) + math.ceil(windows / POSITIONS_PER_PASS)
        return _Passes(side, passes, self.prompt_rows + self.turns * tokens + windows)


def _jobs_of(cell: Cell, quality: dict[str, Quality]) -> Iterator[Job]:
    """Yield the jobs that run models for a cell."""
    if cell.method == LOOP:
        yield cell
    else:
        yield from (cell.predictions().trajectory, cell.predictions())
    if cell.id in quality:
        yield from (quality[cell.id].trajectory, quality[cell.id])


def _prompt_rows(prompt: Prompt, budget: int) -> float:
    """Return the tokens that are prefilled for a prompt: each turn's, after all that was said before it."""
    rows, held = 0.0, float(TEMPLATE_TOKENS)
    for turn in prompt.turns:
        held += len(turn) / CHARACTERS_PER_TOKEN
        rows += held
        held += budget
    return rows


def _window_tokens(text_file: str | None) -> float:
    return Path(text_file).stat().st_size / CHARACTERS_PER_TOKEN if text_file else 0


def _config(model: str) -> dict[str, int] | None:
    """Return the sizes in a model's config.json, None if it is not on this machine.

    Raises ValueError for a file that is no Llama configuration.
    """
    folder = folder_here(model)
    path = folder and folder / "config.json"
    if not path or not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        key_value, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim")
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        shape = {name: int(config[name]) for name in sizes}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no configuration of a Llama model ({error!r})") from None
    head_dim = head_dim or shape["hidden_size"] // heads
    return {**shape, "num_key_value_heads": int(key_value), "head_dim": int(head_dim)}


def plan_lines(config: Mapping[str, Any], alpha: float) -> Iterator[str]:
    """Yield what `scspec plan` prints of a parsed config.yaml: cells, what cannot exist, and the estimate.

    The estimate is of both methods, the configured one first; of replay, why it is not allowed where it is not. Raises
    ValueError as `load_experiment` and `Estimator` do, and `FileNotFoundError` for a prompt or text file.
    """
    experiment = load_experiment(config)
    cells, invalid = expand(experiment)
    estimates = _method_lines(experiment, alpha)
    yield from (cell.id for cell in cells)
    yield from (f"invalid, not run: {combination}" for combination in invalid)
    yield f"{len(cells)} cells, {len(invalid)} invalid combinations"
    yield (
        f"Estimate for backend {experiment.backend}, not a measurement. It assumes that every turn uses its whole "
        f"budget of {experiment.max_new_tokens} tokens, alpha {alpha:g} (identity: 1), a token for "
        f"{CHARACTERS_PER_TOKEN} characters of a prompt, and the machine of benchmarks/LOG.md (others: 3 times off)."
    )
    yield from estimates
    other = REPLAY if experiment.method == LOOP else LOOP
    try:
        yield from _method_lines(load_experiment({**experiment.settings, "method": other}), alpha)
    except ValueError as error:
        yield f"  method {other}: not possible: {error}"


def _method_lines(experiment: Experiment, alpha: float) -> list[str]:
    """Return a line per pair, the total, and what is unknown."""
    cells, _ = expand(experiment)
    estimates = Estimator(experiment, alpha).by_pair(cells, qualities(experiment, cells))
    jobs, tokens = (sum(getattr(its, name) for its in estimates) for name in ("jobs", "tokens"))
    known = [its.hours for its in estimates if its.hours is not None]
    hours = sum(known) if len(known) == len(estimates) else None
    rows = [*estimates, PairEstimate("total", jobs, tokens, hours, ())]
    width = max(len(row.pair) for row in rows)
    device = "GPU" if experiment.device == "cuda" else "core"
    return [
        f"  method {experiment.method}:",
        *(
            f"    {row.pair:{width}}  {row.jobs:5} jobs  {row.tokens:9} tokens to decode  {_shown(row.hours, device)}"
            for row in rows
        ),
        *(f"    unknown: {reason}" for reason in dict.fromkeys(why for its in estimates for why in its.unknown)),
    ]


def _shown(hours: float | None, device: str) -> str:
    number = "unknown" if hours is None else f"{hours:.3g}"
    return f"{number:>8} {device} hours"
