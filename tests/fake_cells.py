"""Synthetic cells with known truth, rows of SCHEMA, for the tests of results, stats, charts and report.

Agreement is a property of positions in the target's text, as it is for greedy decoding: a two-state Markov chain
with mean `alpha` and lag-1 `autocorrelation`. Blocks of any gamma are cut from that text.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from scspec.results import KEY_COLUMNS, NULLABLE_INTEGERS, SCHEMA, SCHEMA_VERSION, write_cell
from scspec.stats import Tally, summarise

EOS_ID = 2
CATEGORIES = ("short QA", "maths", "code", "summarising", "writing", "extraction", "translation", "reasoning")


def agreement_chain(generator, length, alpha, autocorrelation=0.0):
    """(length,) of 0 and 1: agreement at each position of a text."""
    agree = np.empty(length, dtype=np.int64)
    agree[0] = generator.random() < alpha
    for t, u in enumerate(generator.random(length - 1), start=1):
        agree[t] = u < alpha + autocorrelation * (agree[t - 1] - alpha)
    return agree


def fake_text(generator, max_new_tokens, gamma, *, alpha, autocorrelation=0.0, eos_rate=0.0, do_sample=False):
    """(token ids, agreement, beta) of one target text, long enough for a block that starts within the budget."""
    length = max_new_tokens + gamma + 1
    tokens = generator.integers(10, 1000, length)
    tokens[generator.random(length) < eos_rate] = EOS_ID
    if do_sample:
        beta = generator.beta(4 * alpha, 4 * (1 - alpha), length) if 0 < alpha < 1 else np.full(length, alpha)
        return tokens, (generator.random(length) < beta).astype(np.int64), beta
    agree = agreement_chain(generator, length, alpha, autocorrelation)
    return tokens, agree, agree.astype(np.float64)


def blocks_of_text(tokens, agree, beta, *, gamma, max_new_tokens, prompt_tokens=20):
    """The blocks (dicts with the columns that differ between blocks) that speculative decoding makes of a text."""
    blocks, n = [], 0
    while n < max_new_tokens and (not blocks or blocks[-1]["stop"] is None):
        run = agree[n : n + gamma]
        accepted = gamma if run.all() else int(np.argmin(run))
        emitted = tokens[n : n + accepted + 1].tolist()
        if EOS_ID in emitted:
            emitted = emitted[: emitted.index(EOS_ID) + 1]
        kept = min(len(emitted), max_new_tokens - n)
        stop = "eos" if emitted[kept - 1] == EOS_ID else "budget" if n + kept >= max_new_tokens else None
        proposed = np.where(run == 1, tokens[n : n + gamma], tokens[n : n + gamma] + 1000)
        blocks.append(
            {
                "block": len(blocks),
                "start": prompt_tokens + n,
                "prompt_tokens": prompt_tokens,
                "weight": 1.0,
                "proposed_ids": proposed.tolist(),
                "emitted_ids": emitted,
                "accepted": accepted,
                "kept": kept,
                "beta": beta[n : n + len(emitted)].tolist(),
                "margin": [1.0] * len(emitted),
                "stop": stop,
                "draft_time_s": 0.01 * gamma,
                "verify_time_s": 0.02,
            }
        )
        n += len(emitted)
    return blocks


def fake_keys(
    pair="smollm2-shorter",
    arm="sc_sc",
    stoc_len=128,
    gamma=4,
    *,
    draft_stoc_len=None,
    sc_prec=8,
    do_sample=False,
    sc_seed=0,
    **changed,
):
    """The key columns of a cell. Arms with a floating-point side have nulls there."""
    target_sc, draft_sc = arm not in ("float_float", "float_sc"), arm not in ("float_float", "sc_float")
    target_stoc_len = stoc_len if target_sc else None
    draft_stoc_len = (draft_stoc_len or stoc_len) if draft_sc else None
    if not (target_sc or draft_sc):
        sc_prec = sc_seed = None
    lengths = f"L{target_stoc_len or 'f'}_d{draft_stoc_len or 'f'}"
    knobs = json.dumps({"sc_halve_bipolar": False, "skip_layers": []})
    keys = {
        "cell_id": f"{pair}/{arm}/{lengths}_p{sc_prec or 'f'}_g{gamma}_s{int(do_sample)}_n{sc_seed}",
        "pair": pair,
        "arm": arm,
        "stoc_len": target_stoc_len,
        "sc_prec": sc_prec,
        "gamma": gamma,
        "sampling_seed": 0,
        "sc_seed": sc_seed,
        "target_model": "smollm2-135m",
        "draft_model": "smollm2-135m",
        "target_stoc_len": target_stoc_len,
        "draft_stoc_len": draft_stoc_len,
        "target_sc_prec": sc_prec if target_sc else None,
        "draft_sc_prec": sc_prec if draft_sc else None,
        "target_sc_seed": sc_seed if target_sc else None,
        "draft_sc_seed": sc_seed + 1000 * (arm == "reseed") if draft_sc else None,
        "target_settings": knobs,
        "draft_settings": knobs,
        "device": "cpu",
        "backend": "cpu",
        "method": "loop",
        "do_sample": do_sample,
    }
    return {**keys, **changed}


def fake_rows(
    keys,
    *,
    alpha=0.7,
    prompts=16,
    max_new_tokens=40,
    seed=0,
    spread=0.0,
    turns=1,
    categories=CATEGORIES,
    **text,
):
    """The rows of one cell. `alpha` is the truth; `spread` (0..1) is how much prompts differ around it
    (a prompt's own alpha is Beta-distributed with that mean and variance spread * alpha * (1 - alpha))."""
    generator = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        own = alpha
        if spread and 0 < alpha < 1:
            own = generator.beta(alpha * (1 / spread - 1), (1 - alpha) * (1 / spread - 1))
        for turn in range(turns):
            text_of_turn = fake_text(
                generator, max_new_tokens, keys["gamma"], alpha=own, do_sample=keys["do_sample"], **text
            )
            where = {
                "prompt_id": f"p{prompt:02d}",
                "category": categories[prompt % len(categories)],
                "turn": turn,
            }
            blocks = blocks_of_text(*text_of_turn, gamma=keys["gamma"], max_new_tokens=max_new_tokens)
            rows += [{**keys, **where, **block} for block in blocks]
    return rows


def as_blocks(rows):
    """Rows as the table that `read_cells` returns."""
    return pd.DataFrame(rows, columns=SCHEMA.names).astype(NULLABLE_INTEGERS)


def fake_cost(stoc_len):
    """What a token of SmolLM2-135M costs (`hardware.cost_per_token`), over 256 positions."""
    macs = {"linear": 106_168_320, "attention": 8_847_360, "lm_head": 28_311_552}
    return {
        part: {
            "macs": count,
            "mac_cycles": None if stoc_len is None else count * stoc_len,
            "weight_bytes": None if stoc_len is None else float(count * (part != "attention")),
        }
        for part, count in macs.items()
    }


PROCESSORS = {"cpu": "a processor", "cuda": "an accelerator"}


def fake_metadata(keys, **changed):
    """File metadata with every key that a cell needs."""
    greedy = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "cell": {
            "id": keys["cell_id"],
            "max_new_tokens": 40,
            "dtype": "float32",
            "sampling": sampled if keys["do_sample"] else greedy,
        },
        "versions": {"python": "3.11.7", "torch": "2.11.0", "transformers": "5.17.0", "numba": "0.64.0"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "models": {
            side: {
                "source": keys[f"{side}_model"],
                "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc7",
                "note": "4-bit GGUF, dequantised",
            }
            for side in ("target", "draft")
        },
        "prompts": {
            "file": "prompts/bench48.jsonl",
            "sha256": "5e884898da280471",
            "token_ids_sha256": "9f86d081",
        },
        "device": f"{keys['device']}: {PROCESSORS[keys['device']]}",
        "backend": keys["backend"],
        "sc_mac_share": {side: 0.0 if keys[f"{side}_stoc_len"] is None else 0.79 for side in ("target", "draft")},
        "cost": {side: fake_cost(keys[f"{side}_stoc_len"]) for side in ("target", "draft")},
        "weights_note": dict.fromkeys(("target", "draft"), "4-bit GGUF, dequantised"),
        "started_at": "2025-11-24T13:00:00+00:00",
        "wall_time_s": 31.4,
    }
    return {**metadata, **changed}


def fake_summary(rows, **options):
    """Summary of the rows of some cells."""
    blocks = pd.DataFrame(rows)
    cells = blocks[list(KEY_COLUMNS)].drop_duplicates("cell_id").to_dict("records")
    return summarise(Tally.of(blocks), {keys["cell_id"]: fake_metadata(keys) for keys in cells}, **options)


CONTROL_ALPHAS = {"identity": 1, "reseed": 0.74, "float_float": 0.93, "sc_float": 0.66, "float_sc": 0.61}
SKIPPED = json.dumps({"sc_halve_bipolar": False, "skip_layers": [9, 13, 17, 21]})
# pair -> (the draft's lengths relative to the target's, the draft's settings where they are not the target's)
FAKE_PAIRS = {
    "smollm2-shorter": ((7 / 8, 3 / 4, 1 / 2), {}),
    "smollm2-skip": ((1,), {"draft_settings": SKIPPED}),
}


def fake_grid(pairs=tuple(FAKE_PAIRS), stoc_lens=(64, 128, 256), gammas=(2, 4), **changed):
    """(keys, true alpha) of a grid with its controls: longer streams agree more often."""
    cells = []
    for pair in pairs:
        ratios, settings = FAKE_PAIRS[pair]
        for stoc_len, gamma, ratio in product(stoc_lens, gammas, ratios):
            draft = {"draft_stoc_len": round(ratio * stoc_len), **settings, **changed}
            cells.append(
                (
                    fake_keys(pair, "sc_sc", stoc_len, gamma, **draft),
                    0.92 * ratio**0.5 * (1 - 2.5 / stoc_len**0.5),
                )
            )
        controls = [
            (fake_keys(pair, arm, max(stoc_lens), max(gammas), **changed), alpha)
            for arm, alpha in CONTROL_ALPHAS.items()
        ]
        cells += controls
    return cells


def plan_entry(folder, keys):
    """What the plan of a report says about one cell."""
    entry = {name: keys[name] for name in ("cell_id", "pair", "arm", "stoc_len", "sc_prec", "gamma")}
    return {**entry, "path": str(Path(folder, f"{keys['cell_id']}.parquet"))}


def write_fake_grid(folder, cells=None, *, metadata=None, invalid=(), demonstration=False, **rows):
    """Writes a grid of (keys, alpha) as Parquet; returns the plan. Every cell has the same prompts."""
    cells = fake_grid() if cells is None else cells
    entries = [plan_entry(folder, keys) for keys, _ in cells]
    plan = {"demonstration": demonstration, "cells": entries, "invalid": list(invalid)}
    for seed, (entry, (keys, alpha)) in enumerate(zip(plan["cells"], cells, strict=True)):
        its_rows = fake_rows(keys, alpha=alpha, seed=seed, **rows)
        write_cell(entry["path"], its_rows, fake_metadata(keys, **(metadata or {})))
    return plan
