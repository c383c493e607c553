"""Which layers a self-speculative draft should leave out: a greedy search in floating point.

    python benchmarks/choose_skip_layers.py [--model smollm2-135m] [--most 12] [--new-tokens 48]

The target's own greedy continuations of `prompts/calibration.jsonl` (not among the prompts of any grid) are scored by
drafts with more and more layers left out; each step drops the layer whose loss costs least agreement (share of
positions where both argmaxes are equal, which is greedy alpha). Printed for each size: alpha, the draft's cost c
(share of linear-layer MACs) and the modelled speedup with all rows at once, tau / (gamma c + 1), at its best gamma.
The set with the highest speedup wins. Draft & Verify (Zhang et al. 2023, arXiv 2309.08168) searches in the same spirit.
Plain torch arithmetic: this chooses a set, it measures no cell.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from scspec.models import load_tokenizer, local_folder
from scspec.prompts import load_prompts, turn_ids

GAMMAS = range(1, 9)


def continuations(model, tokenizer, new_tokens: int) -> list[tuple[torch.Tensor, int]]:
    """Return (token ids (1, T), length of the prompt) of the target's greedy texts."""
    texts = []
    for prompt in load_prompts("prompts/calibration.jsonl"):
        ids = torch.tensor([turn_ids(tokenizer, prompt)])
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        texts.append((text, ids.shape[1]))
    return texts


def predictions(model, layers, texts) -> torch.Tensor:
    """Return the argmax at every position that predicts a generated token, with only `layers` in place."""
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    found = [model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].argmax(-1) for ids, start in texts]
    return torch.cat(found)


def speedup(alpha: float, cost: float) -> tuple[float, int]:
    """Return (best tau / (gamma cost + 1), its gamma) with tau = 1 + alpha + ... + alpha**gamma."""
    return max((sum(alpha**i for i in range(gamma + 1)) / (gamma * cost + 1), gamma) for gamma in GAMMAS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--most", type=int, default=12, help="layers to leave out at most")
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(local_folder(arguments.model), dtype=torch.float32).eval()
    texts = continuations(model, load_tokenizer(arguments.model), arguments.new_tokens)
    layers = list(model.model.layers)
    with torch.inference_mode():
        wanted, kept = predictions(model, layers, texts), list(range(len(layers)))
        print(f"{len(wanted)} positions")
        for _ in range(arguments.most):
            scores = {}
            for candidate in kept[1:-1]:
                rest = [layers[index] for index in kept if index != candidate]
                scores[candidate] = float((predictions(model, rest, texts) == wanted).double().mean())
            dropped = max(scores, key=scores.get)
            kept.remove(dropped)
            best, gamma = speedup(scores[dropped], len(kept) / len(layers))
            skipped = [index for index in range(len(layers)) if index not in kept]
            print(f"skip {skipped}: alpha {scores[dropped]:.3f}, c {len(kept) / len(layers):.3f}, ", end="")
            print(f"speedup {best:.3f} at gamma {gamma}", flush=True)


if __name__ == "__main__":
    main()
