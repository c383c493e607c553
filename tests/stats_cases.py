"""Cells worked by hand, and simulated cells of independent positions, for the tests of `scspec.stats`."""

import numpy as np
import pandas as pd
from fake_cells import as_blocks, fake_keys, fake_metadata, fake_summary

from scspec.results import KEY_COLUMNS
from scspec.stats import predicted_tau

EASY_AND_HARD = np.array([0.5, 0.9])  # agreement in prompts of two kinds, equally likely


def summary_of(rows, **options):
    (summary,) = fake_summary(rows, **options).to_dict("records")
    return summary


def cells_of(cells):
    return [row for rows in cells for row in rows]


def hand_rows(gamma=2, prompts=("a",)):
    """Greedy blocks of one prompt, gamma 2: (accepted, emitted tokens, beta, kept)."""
    blocks = [
        (2, [1.0, 1.0, 0.0], 3),  # all accepted, the bonus token would have been rejected
        (1, [1.0, 0.0], 2),
        (0, [0.0], 1),
        (2, [1.0, 1.0, 1.0], 2),  # crosses the budget: completed, two tokens kept
        (2, [1.0], 1),  # cut by EOS after its first token, though verification accepted both
    ]
    rows = []
    for prompt in prompts:
        for number, (accepted, beta, kept) in enumerate(blocks):
            rows.append(
                {
                    **fake_keys(gamma=gamma),
                    **{"prompt_id": prompt, "category": "maths", "turn": 0, "block": number},
                    **{"accepted": accepted, "beta": beta, "kept": kept, "weight": 1.0},
                    **{"draft_time_s": 0.5, "verify_time_s": 1.0},
                }
            )
    return rows


def table_of(cells, metadata=None):
    """(blocks, metadata) of some cells, with changes to the metadata of some: {number: {key: value}}."""
    keys = [{name: rows[0][name] for name in KEY_COLUMNS} for rows in cells]
    changed = {number: fake_metadata(its, **(metadata or {}).get(number, {})) for number, its in enumerate(keys)}
    return as_blocks(cells_of(cells)), {its["cell_id"]: changed[number] for number, its in enumerate(keys)}


def unanimous_rows(keys, agreeing):
    """One block a prompt that agrees (1) or not (0) in each of gamma + 1 positions."""
    one, gamma = {**hand_rows()[0], **keys}, keys["gamma"]
    return [
        {**one, "prompt_id": f"p{n:02d}", "beta": [float(agrees)] * (gamma + 1), "accepted": gamma * agrees}
        for n, agrees in enumerate(agreeing)
    ]


def independent_cells(alphas, generator, gamma=4):
    """Blocks and metadata of a cell for each row of alphas (cells, prompts): one block a prompt, positions independent.

    By Wald's identity the emitted positions of a prompt with agreement a hold tau(a) * a agreements on average.
    """
    cells, prompts = alphas.shape
    agree = generator.random((cells * prompts, gamma + 1)) < alphas.reshape(-1, 1)
    accepted = np.cumprod(agree[:, :gamma], axis=1).sum(axis=1)
    keys = [fake_keys(gamma=gamma, sc_seed=cell) for cell in range(cells)]
    table = pd.DataFrame(keys).loc[np.repeat(np.arange(cells), prompts)].reset_index(drop=True)
    beta = [row[: count + 1].astype(float) for row, count in zip(agree, accepted, strict=True)]
    table = table.assign(beta=beta, accepted=accepted, kept=accepted + 1, weight=1.0, category="maths")
    table = table.assign(prompt_id=np.tile(np.arange(prompts), cells), draft_time_s=0.0, verify_time_s=0.0)
    return table, {its["cell_id"]: fake_metadata(its) for its in keys}


def true_alpha_and_tau(alphas, gamma=4):
    """alpha and tau where each of these agreements is as likely: sums over emitted positions, and over blocks."""
    taus = predicted_tau(np.asarray(alphas), gamma)
    return (taus * alphas).sum() / taus.sum(), taus.mean()


def coverage(table, truths, ends):
    """How many rows cover the truth, for alpha and tau."""
    lows, highs = (table[[f"{name}_{end}" for name in ("alpha", "tau")]].to_numpy() for end in ends)
    return ((lows <= truths) & (truths <= highs)).sum(axis=0)
