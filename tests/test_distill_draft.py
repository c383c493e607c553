"""The recipe of the distilled draft, on a tiny target: texts, gradients, and going on where it was interrupted."""

import json
from pathlib import Path

import distill_draft
import pytest
import torch
from instructions import instructions
from safetensors.torch import load_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from scspec.models import load_tokenizer
from scspec.prompts import load_prompts

OPTIONS = ["--device=cpu", "--shards=2", "--texts=6", "--length=150", "--batch=3"]


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A tiny target of characters in place of SmolLM2, with its marks of a turn."""
    folder = save_tiny_model(tmp_path / "target", tie_word_embeddings=True)
    for file in folder.glob("*token*.json"):
        text = file.read_text().replace("<eos>", "<|im_end|>").replace("<bot>", "<|im_start|>")
        file.write_text(text)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    student = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(distill_draft, "TARGET", str(folder))
    monkeypatch.setattr(distill_draft, "STUDENT", student)
    monkeypatch.setattr(distill_draft, "KEYS", {"num_key_value_heads": 1, "head_dim": 8})
    return folder


def run(monkeypatch, output: Path, steps: int = 4, log_every: int = 2) -> dict:
    arguments = [str(output), *OPTIONS, f"--steps={steps}", f"--log-every={log_every}"]
    monkeypatch.setattr("sys.argv", ["distill_draft.py", *arguments])
    distill_draft.main()
    return json.loads((output / "log.json").read_text())


def test_instructions_are_seeded_varied_and_not_those_of_the_prompts():
    found = instructions(3000, 0)
    assert found == instructions(3000, 0) != instructions(3000, 1)
    complete = {text for text, whole in found if whole}
    assert len(complete) > 1200
    assert not any("{" in text for text, _ in found)
    benchmarked = {
        turn for file in Path("prompts").glob("*.jsonl") for p in load_prompts(str(file)) for turn in p.turns
    }
    assert len(benchmarked) > 48
    assert not complete & benchmarked


def test_texts_are_the_targets(target):
    """Its likeliest tokens are those of the whole text scored at once; greedy texts follow the likeliest."""
    tokenizer = load_tokenizer(str(target))
    starts, turn_end = distill_draft.starts_of_texts(tokenizer, 12, 100, seed=0)
    assert {complete for _, complete in starts} == {True, False}
    assert tokenizer.decode(turn_end).startswith("<|im_end|>")
    writer = distill_draft.Writer(torch.device("cpu"), 12, 151)
    texts = writer.write(starts, turn_end, seed=0)
    assert texts["tokens"].shape == (12, 150)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.inference_mode():
        values, likeliest = model(input_ids=texts["tokens"].long()).logits.topk(distill_draft.LIKELIEST)
    # Rows of another shape are summed in another order: a probability moves by some 1e-6, then rounds to float16.
    torch.testing.assert_close(values.softmax(-1), texts["probabilities"].float(), rtol=0, atol=1e-3)
    assert (likeliest[..., 0] == texts["likeliest"][..., 0]).float().mean() > 0.99
    for row, (ids, complete) in enumerate(starts):
        tokens, learn = texts["tokens"][row], texts["learn"][row]
        assert tokens[: len(ids)].tolist() == ids
        assert not learn[: len(ids) - 1].any()
        drawn = (tokens[1:, None] == texts["likeliest"][row, :-1]).any(1)
        assert drawn[learn[:-1]].all()
        if complete and row % len(distill_draft.TEMPERATURES) == 0:
            assert torch.equal(tokens[1:][learn[:-1]], texts["likeliest"][row, :-1, 0][learn[:-1]])
        ends = [at for at in range(149) if learn[at] and tokens[at + 1] == turn_end[0]]
        assert len(ends) <= (1 if complete else 2)
        if not complete and ends:
            assert tokens[ends[0] + 1 :][: len(turn_end)].tolist() == turn_end[: 149 - ends[0]]
            assert not learn[ends[0] + 1 : ends[0] + len(turn_end)].any(), "what was forced is not to be learnt"


def test_the_loss_has_the_gradient_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    # Logits small enough that no probability is under 1e-7, where the loss that is reported is cut.
    tables = [torch.randn(size, generator=generator) / 2 for size in ((20, 8), (50, 8))]
    hidden, embedding = (table.requires_grad_() for table in tables)
    likeliest = torch.stack([torch.randperm(50, generator=generator)[:16] for _ in range(20)]).int()
    wanted = torch.rand(20, 16, generator=generator).softmax(-1)
    loss = distill_draft.Likeliest.apply(hidden, embedding, likeliest, wanted)
    (3 * loss).backward()
    found = [hidden.grad, embedding.grad]
    hidden.grad = embedding.grad = None
    log_q = (hidden.double() @ embedding.double().T).log_softmax(-1)
    formula = -(wanted * log_q.gather(1, likeliest.long())).sum(-1).mean()
    (3 * formula).backward()
    # Sums of at most 50 float32 products near 1: 50 * 2**-24 a sum, and 3 * (Q - P) of them in a row.
    torch.testing.assert_close(loss.double(), formula, rtol=0, atol=1e-4)
    for ours, theirs in zip(found, [hidden.grad, embedding.grad], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_an_interrupted_run_gives_the_weights_of_one_in_a_piece(target, tmp_path, monkeypatch):
    whole = run(monkeypatch, tmp_path / "whole")
    assert [entry["step"] for entry in whole["losses"]] == [2, 4]
    output, loss_of, calls = tmp_path / "parts", distill_draft.loss_of, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distill_draft, "loss_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, output)
    (output / "texts-001.safetensors").unlink()
    parts = run(monkeypatch, output)
    assert parts["sha256"] == whole["sha256"]
    assert parts["recipe"].keys() == {"distill_draft.py", "instructions.py", "instructions.yaml"}
    stored = load_file(output / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.int8, torch.bfloat16, torch.float32}


def test_training_lowers_the_loss(target, tmp_path, monkeypatch):
    """A student that did not learn would stay where its first hundred steps are on average, or above."""
    monkeypatch.setattr(distill_draft, "WARM_UP_STEPS", 10)
    first, last = run(monkeypatch, tmp_path / "run", steps=200, log_every=100)["losses"]
    assert last["cross_entropy"] < 0.9 * first["cross_entropy"]
