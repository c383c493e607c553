"""Models with more logits than their tokenizer has tokens: what no token has is never proposed, chosen or counted."""

import pytest
import torch
from tiny import CHARACTERS, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

from scspec.decoding import generate_cached
from scspec.models import check_vocabularies, load_model, load_spec_models, vocabulary_size
from scspec.patching import patch_model

TOKENS = 4 + len(CHARACTERS)
IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
both = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def padded(folder, rows: int, **changed) -> str:
    """Write a Qwen3 with `rows` logits of no token, one of them always the largest; return the name of the folder."""
    save_tiny_model(folder, family="qwen3", **changed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(TOKENS + rows, mean_resizing=False)
    with torch.no_grad():
        for weight in {model.model.embed_tokens.weight, model.lm_head.weight}:
            weight[TOKENS::2] = 1e4 * weight[TOKENS - 1]
            weight[TOKENS + 1 :: 2] = -1e4 * weight[TOKENS - 1]
    model.save_pretrained(folder)
    assert logits(model).argmax(-1).min() >= TOKENS
    return str(folder)


@both
@pytest.mark.parametrize("overrides", [{}, "float", {"sc_lm_head": True}], ids=["sc", "float", "sc lm head"])
def test_the_logits_are_those_of_the_model_without_padding(tmp_path, tied, overrides):
    found = load_model(padded(tmp_path, 6, tie_word_embeddings=tied), sc_overrides=overrides)
    assert found.config.vocab_size == TOKENS
    wanted = patch_model(tiny_model(family="qwen3", vocab_size=TOKENS, tie_word_embeddings=tied), overrides)
    assert torch.equal(logits(found), logits(wanted))


@both
def test_a_pair_with_paddings_of_its_own_decodes(tmp_path, tied):
    """The same weights: that everything is accepted shows that the two distributions are over the same tokens."""
    folders = [padded(tmp_path / name, rows, tie_word_embeddings=tied) for name, rows in (("large", 11), ("small", 4))]
    target, draft, tokenizer = load_spec_models(*folders)
    for do_sample in (False, True):
        sequence, stats = generate_cached(target, draft, IDS, max_new_tokens=12, gamma=3, do_sample=do_sample)
        assert stats.acceptance_rate == 1.0
        assert sequence.max() < len(tokenizer)


def test_tied_embeddings_stay_one_tensor(tmp_path):
    model = load_model(padded(tmp_path, 6, tie_word_embeddings=True), keep_float_weights=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.untyped_storage().nbytes() == TOKENS * model.config.hidden_size * 4


def test_a_folder_without_tokenizer_has_all_its_logits(tmp_path):
    tiny_model(vocab_size=70).save_pretrained(tmp_path)
    assert vocabulary_size(str(tmp_path)) == load_model(str(tmp_path)).config.vocab_size == 70


def test_fewer_logits_than_tokens_on_one_side_are_refused(tmp_path):
    """A token that one of them can never say."""
    whole = save_tiny_model(tmp_path / "whole")
    short = save_tiny_model(tmp_path / "short", vocab_size=TOKENS - 2)
    message = rf"vocabularies differ \({TOKENS - 2} and {TOKENS} tokens with a logit, {TOKENS} and {TOKENS} tokens\)"
    with pytest.raises(ValueError, match=message):
        check_vocabularies(str(whole), str(short))
