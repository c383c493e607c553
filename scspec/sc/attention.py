"""SC attention over whole keys and values, any scope and backend: the published wiring, and the obvious `causal`.

Slow: it encodes all keys and values at every call. Models in scope `causal` use `cpu_attention`, which is equal bit
for bit; the published scopes have no faster path.
"""

from collections.abc import Callable

import torch

from scspec.sc.encoding import encode, encode_causal
from scspec.sc.matmul import finish, scaled_sums
from scspec.sc.streams import StreamSpec


def sc_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    spec: StreamSpec,
    granularity: str,
    softmax: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    backend: str,
) -> torch.Tensor:
    """Return attention float32 (B, T, H, head_dim); query (B, H, T, head_dim), key and value (B, H_kv, S, head_dim).

    The queries stand at the last T of the S positions. Scores are a product with a scale per row in scope `causal`,
    else per `granularity`; softmax(scores (N, S), visible (N,)) gives probabilities, zero beyond the visible keys.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scores_scope = "per_row" if granularity == "causal" else granularity
    steps, keys = query.shape[2], key.shape[2]
    visible = torch.arange(keys - steps + 1, keys + 1, device=query.device)
    out = []
    for q, k, v in zip(query, key, value, strict=True):
        pair = encode(q, spec, scores_scope), encode(k, spec, scores_scope)
        scores = finish(scaled_sums(*pair, spec, backend), spec) * scaling
        probs = softmax(scores.flatten(0, 1), visible.repeat(q.shape[0])).view_as(scores)
        if granularity == "causal":
            pair = encode_causal(probs, v.transpose(1, 2), spec)
        else:
            pair = encode(probs, spec, granularity), encode(v.transpose(1, 2), spec, granularity)
        out.append(finish(scaled_sums(*pair, spec, backend), spec).transpose(0, 1))
    return torch.stack(out)
