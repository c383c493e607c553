"""A tiny random model: three layers, grouped-query attention, logits that vary with context; cells of it."""

import json

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from scspec.cells import expand
from scspec.config import load_experiment
from scspec.jobs import Cell

#: By family, what its tiny configuration has besides. Qwen2's has no `head_dim`: that follows from the hidden size.
FAMILIES = {
    "llama": {"head_dim": 12},
    "mistral": {"head_dim": 12, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
}


def tiny_config(family: str = "llama", **changed) -> PreTrainedConfig:
    values = {
        "vocab_size": 61,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(family, **{**values, **FAMILIES[family], **changed})


def tiny_model(seed: int = 0, **changed) -> PreTrainedModel:
    """Return the float model; weights large enough that a token's logits depend on what came before.

    changed: as of `tiny_config`, the family among them.
    """
    torch.manual_seed(seed)
    config = tiny_config(**changed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model


CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?!"


def save_tiny_model(folder, seed: int = 0, **changed):
    """Write a tiny model and a character tokenizer with a chat template to `folder`; return `folder`."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<unk>", "<eos>", "<user>", "<bot>", *CHARACTERS])}
    fast = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    model = tiny_model(seed, **{"vocab_size": len(vocab), "eos_token_id": 1, **changed})
    model.save_pretrained(folder)
    return folder


def tiny_cells(folder, prompts) -> dict[str, Cell]:
    """Write a tiny model and the prompts to `folder`; return the cells of a small grid by arm.

    They are sampled, so that every random number matters.
    """
    model = {"model": str(save_tiny_model(folder / "model"))}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    experiment = load_experiment(
        {
            "pairs": {"tiny": {"target": model, "draft": {**model, "stoc_len": {"ratio": 0.5}, "skip_layers": [1]}}},
            "stoc_len": [64],
            "sc_prec": [8],
            "gamma": [3],
            "prompt_file": str(folder / "prompts.jsonl"),
            "max_new_tokens": 10,
            "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "controls": {"stoc_len": [64], "gamma": [3]},
        }
    )
    found, invalid = expand(experiment)
    assert not invalid
    return {cell.arm: cell for cell in found}
