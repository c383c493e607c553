"""One prompt at several stream lengths: models loaded once, floating point first, then each length of both models.

What `scspec sweep` prints is a look, not a result: one prompt is no evidence. Grids are Snakemake's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from scspec.config import BACKENDS, DTYPES
from scspec.decoding import (
    CachedScorer,
    Draws,
    SamplingConfig,
    SpecDecodeStats,
    Turn,
    decode_batch,
    key_from,
    one_turn,
)
from scspec.models import (
    check_vocabularies,
    context_limit,
    load_spec_models,
    load_tokenizer,
    local_folder,
)
from scspec.placement import check_placement
from scspec.preflight import check_length
from scspec.prompts import encode_turn
from scspec.sc.knobs import PRESETS, resolve_knobs
from scspec.task import eos_token_ids, warm_up_turn


@dataclass(frozen=True)
class Sweep:
    """What to run. `stoc_lens`: of both models, clock cycles, in the order in which they run.

    Raises ValueError naming the option, its value and what is allowed: nothing is read or loaded for that.
    """

    target_model: str
    draft_model: str
    prompt: str
    new_tokens: int
    gamma: int
    sampling: SamplingConfig
    stoc_lens: tuple[int, ...]
    sc_prec: int
    sc_granularity: str
    seed: int
    device: str
    dtype: str
    backend: str

    def __post_init__(self) -> None:
        for option in ("target_model", "draft_model", "prompt"):
            if not getattr(self, option).strip():
                raise ValueError(f"{option}={getattr(self, option)!r}: is empty; allowed: a name, or text")
        for option in ("new_tokens", "gamma"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)}: must be 1 or more")
        if not self.stoc_lens:
            raise ValueError("stoc_lens: is empty; allowed: stream lengths with commas between them, such as 128,64")
        for stoc_len in self.stoc_lens:
            self.knobs(stoc_len)
        for option, allowed in (("dtype", DTYPES), ("backend", BACKENDS)):
            if getattr(self, option) not in allowed[self.device]:
                raise ValueError(
                    f"{option}={getattr(self, option)!r}: with device {self.device!r} allowed are "
                    f"{', '.join(allowed[self.device])}"
                )
        check_placement(self.device, getattr(torch, self.dtype), self.backend)

    @classmethod
    def of(
        cls,
        *,
        stoc_lens: str,
        do_sample: bool,
        temperature: float,
        device: str | None,
        dtype: str | None,
        backend: str | None,
        **given: Any,
    ) -> "Sweep":
        """Return what a command line says: lengths with commas between them, and None for what goes with the machine.

        That is the GPU if torch finds one, float16 on it and float32 on the CPU, and the device's fastest backend.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in BACKENDS:
            raise ValueError(f"device={device!r}: allowed are {', '.join(BACKENDS)}")
        return cls(
            **given,
            sampling=SamplingConfig(do_sample, temperature),
            stoc_lens=_lengths(stoc_lens),
            device=device,
            dtype=dtype or ("float16" if device == "cuda" else "float32"),
            backend=backend or BACKENDS[device][0],
        )

    def knobs(self, stoc_len: int | None) -> dict[str, Any]:
        """Return the knobs of both models at a length, None for floating point."""
        if stoc_len is None:
            return PRESETS["float"]
        return resolve_knobs({"sc_prec": self.sc_prec, "sc_stoc_len": stoc_len, "sc_granularity": self.sc_granularity})


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in text.split(",")) if text.strip() else ()
    except ValueError:
        allowed = "whole numbers with commas between them, such as 128,64"
        raise ValueError(f"stoc_lens={text!r}: allowed are {allowed}") from None


@dataclass(frozen=True)
class SweepPoint:
    """What came of one length, None for floating point. `tokens_per_s`: without the prompt's prefill."""

    stoc_len: int | None
    stats: SpecDecodeStats
    tokens_per_s: float
    text: str


def run_sweep(sweep: Sweep) -> Iterator[SweepPoint]:
    """Yield the floating-point baseline, then a point per length, each as soon as it is decoded.

    Names, vocabularies and the prompt's length are checked before a model is loaded. Raises ValueError.
    """
    for name in (sweep.draft_model, sweep.target_model):  # what is to be fetched first is the smaller one
        local_folder(name)
    check_vocabularies(sweep.target_model, sweep.draft_model)
    ids = encode_turn(load_tokenizer(sweep.target_model), [], sweep.prompt)
    limit = min(map(context_limit, (sweep.target_model, sweep.draft_model)))
    check_length("prompt", len(ids), sweep.new_tokens, sweep.gamma + 1, limit)
    target, draft, tokenizer = load_spec_models(
        sweep.target_model,
        sweep.draft_model,
        device=sweep.device,
        dtype=getattr(torch, sweep.dtype),
        backend=sweep.backend,
        target_sc_overrides=sweep.knobs(None),
        draft_sc_overrides=sweep.knobs(None),
        keep_float_weights=True,
    )
    for stoc_len in (None, *sweep.stoc_lens):
        for model in (target, draft):
            model.config.update(sweep.knobs(stoc_len))
        yield _point(sweep, stoc_len, target, draft, tokenizer, ids)


def _point(sweep: Sweep, stoc_len: int | None, target: Any, draft: Any, tokenizer: Any, ids: list[int]) -> SweepPoint:
    """Return what the models decode with the knobs they now have, after a few blocks that nobody counts."""
    scorers = CachedScorer(target, _capacity(sweep, ids)), CachedScorer(draft, _capacity(sweep, ids))
    decoded = partial(decode_batch, *scorers, gamma=sweep.gamma, sampling=sweep.sampling)
    warm_up = warm_up_turn(ids, sweep.new_tokens, sweep.gamma, sweep.device)
    for _ in decoded([one_turn(warm_up)], eos_token_ids=frozenset()):
        pass
    turn, eos = Turn(ids, sweep.new_tokens, Draws(key_from(sweep.seed))), eos_token_ids(target, tokenizer)
    blocks = tuple(block for _, _, block in decoded([one_turn(turn)], eos_token_ids=eos))
    stats = SpecDecodeStats(blocks)
    wall_time_s = sum(block.draft_time_s + block.verify_time_s for block in blocks)
    new_ids = [token for block in blocks for token in block.emitted[: block.kept]]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    return SweepPoint(stoc_len, stats, stats.new_tokens / wall_time_s, text)


def _capacity(sweep: Sweep, ids: list[int]) -> int:
    """Return the positions that the prompt and its text need."""
    return len(ids) + sweep.new_tokens + sweep.gamma + 1


def point_lines(point: SweepPoint) -> Iterator[str]:
    """Yield a point as text: its numbers on one line, then what was decoded."""
    stats, name = point.stats, "floating point" if point.stoc_len is None else f"stoc_len {point.stoc_len}"
    yield (
        f"{name}: alpha {stats.alpha:.4f}, tau {stats.tau:.3f}, acceptance rate {stats.acceptance_rate:.4f}, "
        f"{point.tokens_per_s:.2f} tokens/s"
    )
    yield from (f"    {line}" for line in point.text.splitlines())
