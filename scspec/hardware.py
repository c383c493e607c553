"""What decoding would cost on stochastic hardware: multiply-accumulates (MACs) and cycles -> speedups and energy.

A MAC in stochastic computing keeps its gate busy for `stoc_len` clock cycles, so all costs are *MAC-cycles*: MACs times
stream length (docs/method.md). Everything is relative to plain decoding on the same array; NaN goes through.

Not covered: converters between numbers and streams, what is not a matmul, traffic of the KV cache and of activations;
the row by which a draft takes in its last proposal when all were accepted, at most one draft row a block. GPU time is
the simulator's cost and never enters.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from scspec.families import head_dim
from scspec.sc.knobs import SC_CONFIG_DEFAULTS, deciding_patterns, stream_spec
from scspec.sc.streams import StreamSpec

#: Cached positions at which attention's share is counted, unless said otherwise.
CONTEXT_TOKENS = 256

#: Part of a model -> the knob that puts it under SC.
_SWITCHES = {"linear": "use_sc_linear", "attention": "use_sc_attn", "lm_head": "sc_lm_head"}


def module_macs(config: Any, context_tokens: int = CONTEXT_TOKENS) -> dict[str, int]:
    """Return the MACs of one token by module, under the names that Hugging Face gives modules.

    "model.layers.3.self_attn" stands for both products of that layer's attention, over `context_tokens` positions.
    config: of a modelled family; where layers were skipped, it counts and numbers those that remain.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * head_dim(config)
    key_value = config.num_key_value_heads * head_dim(config)
    layer = {
        "self_attn.q_proj": hidden * query,
        "self_attn.k_proj": hidden * key_value,
        "self_attn.v_proj": hidden * key_value,
        "self_attn": 2 * query * context_tokens,
        "self_attn.o_proj": query * hidden,
        "mlp.gate_proj": hidden * inner,
        "mlp.up_proj": hidden * inner,
        "mlp.down_proj": inner * hidden,
    }
    layers = range(config.num_hidden_layers)
    macs = {f"model.layers.{index}.{name}": count for index in layers for name, count in layer.items()}
    return {**macs, "lm_head": hidden * config.vocab_size}


def _part(module: str) -> str:
    if module == "lm_head":
        return "lm_head"
    return "attention" if module.endswith(".self_attn") else "linear"


def macs_per_token(config: Any, context_tokens: int = CONTEXT_TOKENS) -> dict[str, int]:
    """Return the MACs of one token by part: "linear", "attention" (both products, over the context), "lm_head"."""
    macs = dict.fromkeys(_SWITCHES, 0)
    for module, count in module_macs(config, context_tokens).items():
        macs[_part(module)] += count
    return macs


def sc_mac_share(config: Any, context_tokens: int = CONTEXT_TOKENS) -> float:
    """Return the fraction of a token's MACs, LM head included, that the knobs on `config` put under SC."""
    macs = macs_per_token(config, context_tokens)
    return sum(macs[part] for part, switch in _SWITCHES.items() if getattr(config, switch)) / sum(macs.values())


def _streams_of(config: Any) -> Callable[[str], StreamSpec]:
    """Return what tells a module's streams by its name: the model's, but where `sc_modules` sets others."""
    patterns = deciding_patterns(config.sc_modules, module_macs(config))
    knobs = {name: getattr(config, name) for name in SC_CONFIG_DEFAULTS}
    return lambda module: stream_spec(SimpleNamespace(**{**knobs, **config.sc_modules.get(patterns.get(module), {})}))


def cost_per_token(config: Any, context_tokens: int = CONTEXT_TOKENS) -> dict[str, dict[str, float | None]]:
    """Return what one token costs, by part ("linear", "attention", "lm_head"); JSON can hold it.

    Of each part: "macs"; "mac_cycles", MACs times the stream length of each module; "weight_bytes", what a pass reads,
    sc_prec bits a weight (without its scales). The last two are None for a part in floating point, which has no
    streams. The LM head is costed with the model's streams even where it is not under SC (`sc_lm_head`), since a
    figure with LM head means all matmuls, and is None only where nothing of the model is under SC.
    config: a patched model's, with the knobs of `sc.knobs` as attributes. Raises ValueError for knobs that
    `stream_spec` refuses.
    """
    streams_of, macs = _streams_of(config), module_macs(config, context_tokens)
    in_sc = {part: getattr(config, switch) for part, switch in _SWITCHES.items()}
    in_sc["lm_head"] = any(in_sc.values())
    cost: dict[str, dict[str, float]] = {part: {"macs": 0, "mac_cycles": 0, "weight_bytes": 0.0} for part in _SWITCHES}
    for module, count in macs.items():
        part, streams = _part(module), streams_of(module)
        weights = 0 if part == "attention" else count  # a weight is in one MAC of each token
        cost[part]["macs"] += count
        cost[part]["mac_cycles"] += count * streams.stoc_len
        cost[part]["weight_bytes"] += weights * streams.sc_prec / 8
    floating: dict[str, float | None] = dict.fromkeys(("mac_cycles", "weight_bytes"))
    return {part: {**of_part, **({} if in_sc[part] else floating)} for part, of_part in cost.items()}


def total_cost(cost: dict[str, dict[str, float | None]], quantity: str, *, lm_head: bool) -> float:
    """Return a quantity of `cost_per_token` summed over a model's parts, with or without the LM head.

    NaN where one of them has none: a model that is partly in floating point has no cost in cycles.
    """
    values = [of_part[quantity] for part, of_part in cost.items() if lm_head or part != "lm_head"]
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else float("nan")


def relative_cost(draft_cycles: ArrayLike, target_cycles: ArrayLike) -> np.ndarray:
    """Return c, the cost of a draft token in target tokens: MACs_d L_d / (MACs_t L_t)."""
    return np.divide(draft_cycles, target_cycles)


def speedup_at_once(tau: ArrayLike, gamma: ArrayLike, c: ArrayLike) -> np.ndarray:
    """Return the speedup where the array holds all gamma + 1 rows of a target pass at once: tau / (gamma c + 1).

    tau: emitted tokens per target pass, 1..gamma + 1. c: `relative_cost`. Arguments broadcast.
    Source: Leviathan et al. 2023 (arXiv 2211.17192), theorem 3.8, with the tau that was measured.
    """
    speedup: np.ndarray = np.divide(tau, np.multiply(gamma, c) + 1)
    return speedup


def speedup_in_turn(tau: ArrayLike, gamma: ArrayLike, c: ArrayLike) -> np.ndarray:
    """Return the speedup where rows take turns on the array: tau / (gamma c + gamma + 1).

    Never above 1, since tau is at most gamma + 1: speculation then saves nothing, which is a finding. Arguments as
    those of `speedup_at_once`.
    """
    speedup: np.ndarray = np.divide(tau, np.add(np.multiply(gamma, c), gamma) + 1)
    return speedup


def energy_ratio(tau: ArrayLike, gamma: ArrayLike, c: ArrayLike) -> np.ndarray:
    """Return the energy of a token relative to plain decoding, (gamma c + gamma + 1) / tau: never below 1.

    Energy goes with MAC-cycles, whichever rows share them in time; arguments as those of `speedup_at_once`.
    Source: Leviathan et al. 2023, theorem 3.11 (operations).
    """
    return 1 / speedup_in_turn(tau, gamma, c)


def pass_cycles(
    rows: ArrayLike,
    mac_cycles: ArrayLike,
    weight_bytes: ArrayLike,
    *,
    rows_at_once: ArrayLike,
    cycles_per_byte: ArrayLike,
) -> np.ndarray:
    """Return how long a pass of `rows` tokens takes: the later of its arithmetic and its weights (roofline).

    The unit is the time of one MAC-cycle of one row. Arithmetic: ceil(rows / P) groups of `mac_cycles` each,
    P = `rows_at_once` >= 1 the rows that work in parallel on the same weight, each as fast as one row alone. Weights:
    `weight_bytes`, read once a pass and not once a group. All rows are known when a pass starts, so that a weight can
    stay until every group has met it; a bound wants the least traffic that a schedule can have, and that is it.
    `cycles_per_byte` >= 0 is the machine's balance: MAC-cycles that a row does while one byte arrives, 0 for memory
    that never limits. A lone row at sc_prec 8 waits for its weights where this is above its stream length (attention
    aside). Arguments broadcast. Raises ValueError for rows_at_once below 1 and a negative cycles_per_byte.
    Source: Williams, Waterman & Patterson 2009, "Roofline" (CACM 52:4); its overlap of arithmetic and traffic.
    """
    if np.any(np.less(rows_at_once, 1)):
        raise ValueError(f"rows_at_once={np.asarray(rows_at_once)}: must be 1 or more")
    if np.any(np.less(cycles_per_byte, 0)):
        raise ValueError(f"cycles_per_byte={np.asarray(cycles_per_byte)}: must be 0 (no limit) or more")
    groups = np.ceil(np.divide(rows, rows_at_once))
    return np.maximum(groups * mac_cycles, np.multiply(weight_bytes, cycles_per_byte))


def speedup_roofline(
    tau: ArrayLike,
    gamma: ArrayLike,
    draft: tuple[ArrayLike, ArrayLike],
    target: tuple[ArrayLike, ArrayLike],
    *,
    rows_at_once: ArrayLike,
    cycles_per_byte: ArrayLike,
) -> np.ndarray:
    """Return the speedup over plain decoding of the same target on an array of P rows with bounded memory.

    A block is gamma draft passes of one row and a target pass of gamma + 1; plain decoding is target passes of one row.
    draft, target: (MAC-cycles, weight bytes) of one token. How passes are timed, and errors: `pass_cycles`. Never
    falls in P. Without a bound by memory it is `speedup_in_turn` at P = 1 and `speedup_at_once` from P = gamma + 1 on;
    where memory bounds every pass it is `speedup_at_once` with c the ratio of weight bytes, which short streams do
    not lower.
    """
    array = {"rows_at_once": rows_at_once, "cycles_per_byte": cycles_per_byte}
    draft_pass, plain_pass = pass_cycles(1, *draft, **array), pass_cycles(1, *target, **array)
    verification = pass_cycles(np.add(gamma, 1), *target, **array)
    speedup: np.ndarray = np.multiply(tau, plain_pass) / (gamma * draft_pass + verification)
    return speedup


def speedup_over_other_length(
    speedup: ArrayLike, own_target_cycles: ArrayLike, other_target_cycles: ArrayLike
) -> np.ndarray:
    """Return a speedup over plain decoding at the own target length as one over plain decoding at another length.

    A shorter other length makes it smaller, by the ratio of MAC-cycles a token (or of `pass_cycles` of one row).
    """
    return np.multiply(speedup, other_target_cycles) / own_target_cycles


def modelled(summary: pd.DataFrame, metadata: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """Return a summary (`stats.summarise`) with what the hardware model makes of each cell, in columns more.

    target_cycles, draft_cycles (MAC-cycles a token), c, speedup_at_once, speedup_in_turn, energy_ratio, and each again
    with `_with_head` at its end, the LM head included; NaN where a side is not in SC.
    """
    costs = [metadata[cell_id]["cost"] for cell_id in summary["cell_id"]]
    tau, gamma = (summary[name].to_numpy(np.float64) for name in ("tau", "gamma"))
    columns = {}
    for lm_head, end in ((False, ""), (True, "_with_head")):
        for side in ("target", "draft"):
            cycles = [total_cost(cost[side], "mac_cycles", lm_head=lm_head) for cost in costs]
            columns[f"{side}_cycles{end}"] = np.array(cycles, np.float64)
        c = columns[f"c{end}"] = relative_cost(columns[f"draft_cycles{end}"], columns[f"target_cycles{end}"])
        for model in (speedup_at_once, speedup_in_turn, energy_ratio):
            columns[f"{model.__name__}{end}"] = model(tau, gamma, c)
    return summary.assign(**columns)


def best_setting(
    table: pd.DataFrame, max_quality_loss: float, speedup: Callable[..., np.ndarray] = speedup_at_once
) -> dict[str, Any] | None:
    """Return the row of `table` that is fastest at a quality still acceptable, or None where no row is a candidate.

    table: settings of one pair, with the columns target_stoc_len, draft_stoc_len, gamma, tau, c, target_cycles
    (MAC-cycles a token) and quality_loss (relative rise of perplexity over the float target, NaN where not measured);
    decoding is exact, so the target's quality is that of the text. A row is acceptable if its quality_loss is at most
    `max_quality_loss` and its target is under SC (target_cycles not NaN), and a candidate if tau and c are known too.
    speedup: `speedup_at_once`, `speedup_in_turn`, or another function of (tau, gamma, c).
    The row comes as a dict with two keys more: "plain_stoc_len", the target length of the acceptable row with the
    fewest target cycles, and "speedup", over plain decoding at that length; at most 1 where speculation does not pay.
    Ties take the earlier row. Raises ValueError for a max_quality_loss that is negative or NaN.
    """
    if not max_quality_loss >= 0:
        raise ValueError(f"max_quality_loss={max_quality_loss}: must be 0 or more")
    acceptable = table[(table["quality_loss"] <= max_quality_loss) & table["target_cycles"].notna()]
    if acceptable.empty:
        return None
    tau, gamma, c, cycles = (acceptable[name].to_numpy(np.float64) for name in ("tau", "gamma", "c", "target_cycles"))
    plain = cycles.argmin()
    gain = speedup_over_other_length(speedup(tau, gamma, c), cycles, cycles[plain])
    if np.isnan(gain).all():
        return None
    (row,) = acceptable.iloc[[np.nanargmax(gain)]].to_dict("records")
    return {**row, "plain_stoc_len": int(acceptable["target_stoc_len"].iloc[plain]), "speedup": float(np.nanmax(gain))}
