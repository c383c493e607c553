"""What a forward costs in multiply-accumulates (MACs), from a model's shapes."""

#: Cached positions at which attention's share is counted, unless said otherwise.
CONTEXT_TOKENS = 256


def macs_per_token(config, context_tokens: int = CONTEXT_TOKENS) -> dict[str, int]:
    """Return the MACs of one token by part: "linear", "attention" (both products, over the context), "lm_head"."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    return {
        "linear": layers * (2 * hidden * query + 2 * hidden * key_value + 3 * hidden * inner),
        "attention": layers * 2 * query * context_tokens,
        "lm_head": hidden * config.vocab_size,
    }


def sc_mac_share(config, context_tokens: int = CONTEXT_TOKENS) -> float:
    """Return the fraction of a token's MACs, LM head included, that the knobs on `config` put under SC."""
    macs = macs_per_token(config, context_tokens)
    under_sc = {
        "linear": config.use_sc_linear,
        "attention": config.use_sc_attn,
        "lm_head": config.sc_lm_head,
    }
    return sum(macs[part] for part, on in under_sc.items() if on) / sum(macs.values())
