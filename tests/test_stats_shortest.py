"""The shortest streams that keep a share of the floating-point alpha: by hand, against a plain loop, and refusals."""

import math

import numpy as np
import pytest
from fake_cells import fake_keys, fake_rows
from stats_cases import table_of, unanimous_rows

from scspec.stats import Tally, shortest_streams
from scspec.stats.joint import resampled_cells

FLOAT = fake_keys(arm="float_float")
LENGTHS = (32, 64, 128)


def grid(alphas, lengths=LENGTHS, *, prompts=16, **rows):
    """(blocks, metadata, lengths) of a cell per length with these alphas, and floating point with alpha 0.9."""
    keys = [fake_keys(stoc_len=length) for length in lengths]
    own = [fake_rows(its, alpha=alpha, prompts=prompts, **rows) for its, alpha in zip(keys, alphas, strict=True)]
    blocks, metadata = table_of([fake_rows(FLOAT, alpha=0.9, prompts=prompts, **rows), *own])
    return blocks, metadata, dict(zip((its["cell_id"] for its in keys), lengths, strict=True))


def of(blocks, metadata, lengths, **options):
    return shortest_streams(Tally.of(blocks), metadata, lengths, [FLOAT["cell_id"]], **options)


def agreeing(keys, share, prompts=20):
    return unanimous_rows(keys, [int(n < share * prompts) for n in range(prompts)])


def by_hand(*shares, reference=0.8):
    """Of 20 prompts a share agrees everywhere: alphas are these shares exactly."""
    keys = [fake_keys(stoc_len=length) for length in LENGTHS]
    cells = [agreeing(its, share) for its, share in zip(keys, shares, strict=True)]
    blocks, metadata = table_of([agreeing(FLOAT, reference), *cells])
    return blocks, metadata, dict(zip((its["cell_id"] for its in keys), LENGTHS, strict=True))


@pytest.mark.parametrize(
    ("shares", "length", "alpha"),
    [
        ((0.5, 0.75, 0.8), 128, 0.8),  # 0.75 is below 0.95 * 0.8 = 0.76
        ((0.5, 0.8, 0.8), 64, 0.8),
        ((0.85, 0.5, 0.8), 32, 0.85),  # the shortest counts, also where a longer one falls short
        ((0.5, 0.5, 0.75), math.inf, math.nan),
    ],
)
def test_the_shortest_length_that_keeps_the_share(shares, length, alpha):
    found = of(*by_hand(*shares))
    assert found["length"] == length
    assert found["alpha"] == pytest.approx(alpha, nan_ok=True)
    assert (found["reference_alpha"], found["prompts"]) == (pytest.approx(0.8), 20)


def test_another_share():
    assert of(*by_hand(0.5, 0.75, 0.8), share=0.9)["length"] == 64


def test_an_alpha_that_meets_the_share_exactly_keeps_it():
    assert of(*by_hand(0.5, 0.6, 0.8), share=0.75)["length"] == 64


def test_what_agrees_as_the_reference_in_every_prompt_has_no_other_length_in_any_resample():
    found = of(*by_hand(0.0, 0.8, 0.8))
    assert (found["length_lo"], found["length"], found["length_hi"]) == (64, 64, 64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("resamples", [40, 400])
def test_bounds_are_those_of_the_same_choice_in_each_resample(resamples, seed):
    blocks, metadata, lengths = grid(np.linspace(0.72, 0.9, 16), range(8, 136, 8), prompts=8, spread=0.1)
    found = of(blocks, metadata, lengths, resamples=resamples, seed=seed)
    cells = resampled_cells(Tally.of(blocks), resamples, seed)
    chosen = []
    for draw in range(resamples):
        enough = 0.95 * cells[FLOAT["cell_id"]].alphas[draw]
        kept = [length for cell_id, length in lengths.items() if cells[cell_id].alphas[draw] >= enough]
        chosen.append(min(kept, default=math.inf))
    chosen.sort()
    tail = resamples // 40  # 2.5 % of them
    assert (found["length_lo"], found["length_hi"]) == (chosen[tail - 1], chosen[-tail])
    assert len(set(chosen)) > 2  # or the bounds would show nothing


def test_seeds_and_gammas_of_one_length_count_with_their_mean():
    low, high = fake_keys(stoc_len=64), fake_keys(stoc_len=64, sc_seed=1)
    blocks, metadata = table_of([agreeing(FLOAT, 0.8), agreeing(low, 0.6), agreeing(high, 0.9)])
    both = {low["cell_id"]: 64, high["cell_id"]: 64}
    assert of(blocks, metadata, both)["length"] == math.inf  # their mean is 0.75
    assert of(blocks, metadata, {high["cell_id"]: 64})["length"] == 64
    assert shortest_streams(Tally.of(blocks), metadata, both, [low["cell_id"], FLOAT["cell_id"]])["length"] == 64


@pytest.mark.parametrize(("prompts", "bounds"), [(7, False), (8, True)])
def test_few_prompts_have_no_bounds(prompts, bounds):
    found = of(*grid((0.9, 0.9, 0.9), prompts=prompts))
    assert np.isfinite(found["length"])
    assert (~np.isnan([found["length_lo"], found["length_hi"]])).tolist() == [bounds, bounds]


def test_cells_with_other_prompts_are_refused():
    keys = fake_keys(stoc_len=64)
    blocks, metadata = table_of([agreeing(FLOAT, 0.8), agreeing(keys, 0.8, prompts=19)])
    with pytest.raises(ValueError, match="must have the same prompts to be compared, not 20 and 19"):
        of(blocks, metadata, {keys["cell_id"]: 64})


def test_a_cell_that_has_no_blocks_is_named():
    blocks, metadata, lengths = grid((0.9, 0.9, 0.9))
    with pytest.raises(ValueError, match="no blocks of cell 'nobody'"):
        of(blocks, metadata, {**lengths, "nobody": 16})
