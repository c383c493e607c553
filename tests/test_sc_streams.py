"""The bit streams: Sobol order by hand, equal use of every level, scrambles, prefixes, discrepancy, tables."""

import brute_force
import numpy as np
import pytest

from scspec.sc.streams import (
    StreamSpec,
    boundaries,
    count_table,
    ones_table,
    resolve_streams,
    scrambles,
    sobol_points,
    stream_levels,
)

PRECISIONS = range(2, 9)
SEEDS = range(5)

each_precision = pytest.mark.parametrize("sc_prec", PRECISIONS)
each_operand = pytest.mark.parametrize("operand", ["a", "b"])


def test_sobol_points_by_hand():
    """p = 2: v = (1 << 2) >> 1, >> 2 = 2, 1. Element 0 is 0. k = 0 has no trailing one: xor v[0] = 2 -> 2.
    k = 1 = 01 has one: xor v[1] = 1 -> 3. k = 2 = 10 has none: xor 2 -> 1.
    p = 3: v = 4, 2, 1; trailing ones of k = 0..6 are 0, 1, 0, 2, 0, 1, 0:
    0 ^4-> 4 ^2-> 6 ^4-> 2 ^1-> 3 ^4-> 7 ^2-> 5 ^4-> 1.
    """
    for operand in "ab":
        assert sobol_points(operand, 2).tolist() == [0, 2, 3, 1]
        assert sobol_points(operand, 3).tolist() == [0, 4, 6, 2, 3, 7, 5, 1]


def test_operand_b_leaves_a_at_its_own_directions():
    """p = 5, b: seed[4] = 9, so v[4] = (9 << 5) >> 5 = 9, where a has 1. v[4] first enters after k = 15 (01111).
    Element 15 is reached with v[0..3] alone, and Gray code makes it v[3] = 2; element 16 is 2 ^ 9 = 11, a's 2 ^ 1 = 3.
    p = 8, b: seed[7] = 255, v[7] = 255, first used after k = 127: element 127 is v[6] = (41 << 8) >> 7 = 82.
    """
    a, b = sobol_points("a", 5), sobol_points("b", 5)
    assert a[:16].tolist() == b[:16].tolist()
    assert (a[15], a[16], b[16]) == (2, 3, 11)
    b = sobol_points("b", 8)
    assert (b[127], b[128]) == (82, 82 ^ 255)
    assert sobol_points("b", 7)[64] == 41 ^ sobol_points("b", 7)[63]  # v[6] = (41 << 7) >> 7


@each_precision
@each_operand
def test_points_equal_the_single_bit_loops(operand, sc_prec):
    assert sobol_points(operand, sc_prec).tolist() == brute_force.sobol(operand, sc_prec)


@each_precision
@each_operand
@pytest.mark.parametrize("sc_seed", SEEDS)
def test_full_streams_hold_every_level_equally_often(operand, sc_prec, sc_seed):
    base = 2**sc_prec
    for grid in (2**i for i in range(1, sc_prec + 1)):
        levels = stream_levels(operand, resolve_streams("bipolar", sc_prec, base, grid, sc_seed=sc_seed))
        assert levels.shape == (base, base)
        assert (np.sort(levels, axis=1) == np.repeat(np.arange(grid), base // grid)).all()


def test_published_scramble_is_the_reversed_dimension():
    assert scrambles(resolve_streams("bipolar", 3, 7)).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert scrambles(resolve_streams("bipolar", 3, 8, 4)).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert scrambles(resolve_streams("bipolar", 3)).tolist() == [0] * 8


@each_precision
def test_seeds_draw_different_permutations(sc_prec):
    base = 2**sc_prec
    drawn = [tuple(scrambles(resolve_streams("bipolar", sc_prec, sc_seed=seed))) for seed in range(1, 9)]
    for scramble in drawn:
        assert sorted(scramble) == list(range(base))
    published = tuple(scrambles(resolve_streams("bipolar", sc_prec, 1)))
    if base >= 8:  # 4 values have 24 permutations only, so that collisions are to be expected
        assert len({*drawn, published, (0,) * base}) == 10
    else:
        assert len(set(drawn)) > 1


def test_seeds_are_applied_at_every_length_and_grid():
    specs = [
        resolve_streams("bipolar", 8, length, grid, sc_seed=3) for length in (1, 128, 256) for grid in (2, 128, 256)
    ]
    assert len({tuple(scrambles(spec)) for spec in specs}) == 1


@each_operand
@pytest.mark.parametrize("sc_seed", [0, 1])
def test_a_shorter_stream_is_the_beginning_of_a_longer_one(operand, sc_seed):
    """Both scrambled: at seed 0 that leaves out the whole, unscaled sequence."""
    for grid in (256, 64):
        longest = 255 if grid == 256 and sc_seed == 0 else 256
        longer = stream_levels(operand, resolve_streams("bipolar", 8, longest, grid, sc_seed=sc_seed))
        for length in (1, 31, 64, 100, 128, 254):
            shorter = stream_levels(operand, resolve_streams("bipolar", 8, length, grid, sc_seed=sc_seed))
            np.testing.assert_array_equal(shorter, longer[:, :length])


@each_precision
@each_operand
@pytest.mark.parametrize("sc_seed", [0, 2])
def test_marginal_counts_keep_the_discrepancy_of_a_net(operand, sc_prec, sc_seed):
    """|#{t < L: r < B} - L B / grid| < number of one bits of L.

    The direction matrix is triangular with a unit diagonal, so each aligned run of 2**m points has one in every
    interval of length 2**-m, whatever the xor. L points are as many such runs as L has one bits, and a run misses
    its share of [0, B) by less than one point.
    """
    base = 2**sc_prec
    for length in sorted({1, 2, 3, base // 2, base // 2 + 1, base - 1, base, *range(1, base, 23)}):
        for grid in {2, base // 2, base}:
            levels = stream_levels(operand, resolve_streams("bipolar", sc_prec, length, grid, sc_seed=sc_seed))
            bounds = np.arange(grid + 1)
            ones = (levels[:, :, None] < bounds).sum(axis=1)
            assert (np.abs(ones - length * bounds / grid) < length.bit_count()).all()


@pytest.mark.parametrize("sc_seed", [0, 1, 2, 1003])
def test_products_of_every_scramble_come_closer_to_the_exact_ones_with_length(sc_seed):
    """Every pair of codes in every dimension. The K ones of a leave K random levels of b, as many aligned runs as K has
    one bits, each of which misses its share of [0, B) by less than one point; K itself misses its own likewise:
    |count - L x y| <= ones of K + y (ones of L), so the relative error falls about as log2(L) / L.
    """
    errors = []
    for stoc_len in (8, 16, 32, 64, 128, 256):
        spec = resolve_streams("bipolar", 8, stoc_len, sc_seed=sc_seed)
        ones, share = ones_table(spec).astype(np.int64), boundaries(spec) / spec.rng_levels
        counts = count_table(spec)[np.arange(spec.base)[:, None], ones].astype(np.float64)
        misses = np.abs(counts - stoc_len * share[:, None] * share)
        runs = np.array([int(k).bit_count() for k in range(stoc_len + 1)])[ones]
        assert (misses <= runs[:, :, None] + share * stoc_len.bit_count()).all()
        errors.append(float(np.sqrt((misses**2).mean())) / stoc_len)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
@pytest.mark.parametrize(("sc_prec", "stoc_len", "grid"), [(2, 3, 4), (4, 16, 8), (5, 21, 32), (8, 48, 128)])
def test_tables_equal_the_streams(mode, sc_prec, stoc_len, grid):
    spec = resolve_streams(mode, sc_prec, stoc_len, grid)
    q, base = brute_force.largest(mode, sc_prec), 2**sc_prec
    bounds = [brute_force.boundary(i, grid, q) for i in range(q + 1)]
    assert boundaries(spec).tolist() == bounds
    assert ones_table(spec).shape == (base, q + 1)
    assert count_table(spec).shape == (base, stoc_len + 1, q + 1)
    levels_a, levels_b = (brute_force.levels(op, base, sc_prec, stoc_len, grid) for op in "ab")
    rng = np.random.default_rng(0)
    for _ in range(200):
        d, k, i = int(rng.integers(base)), int(rng.integers(stoc_len + 1)), int(rng.integers(q + 1))
        assert ones_table(spec)[d, i] == sum(level < bounds[i] for level in levels_a[d])
        assert count_table(spec)[d, k, i] == sum(level < bounds[i] for level in levels_b[d, :k])


def test_tables_cannot_be_written():
    spec = resolve_streams()
    for table in (stream_levels("a", spec), boundaries(spec), ones_table(spec), count_table(spec)):
        with pytest.raises(ValueError, match="read-only"):
            table[:1] = 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, StreamSpec(8, 256, 256)),
        ({"halve_bipolar_stoc_len": True}, StreamSpec(8, 128, 128)),
        ({"halve_bipolar_stoc_len": True, "stoc_len": 256}, StreamSpec(8, 256, 128)),
        ({"halve_bipolar_stoc_len": True, "rng_levels": 256}, StreamSpec(8, 128, 256)),
        ({"halve_bipolar_stoc_len": True, "mode": "unipolar"}, StreamSpec(8, 256, 256, "unipolar")),
        ({"sc_prec": 5, "stoc_len": 20, "sc_seed": 9}, StreamSpec(5, 20, 32, "bipolar", 9)),
    ],
)
def test_defaults(arguments, expected):
    assert resolve_streams(**arguments) == expected
