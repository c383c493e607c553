"""A small draft for SmolLM2-135M by distillation: texts by the target itself, then a student of its distributions.

    python training/distill_draft.py OUTPUT [--device cuda] [--seed 0] [--shards 40] [--steps 15000]

Three steps, each of which goes on where an interrupted run has stopped; the same seed gives the same instructions:
1. texts: the target answers the instructions of `instructions.py`, thousands side by side, and finishes those of which
   only the first words are given. Kept are the tokens and, for each that it drew, its likeliest tokens and how likely.
2. student: a Llama of a few layers with the target's tokenizer. Its embeddings start as the principal components of the
   target's; it learns to predict the likeliest tokens as the target does (Hinton et al. 2015, arXiv 1503.02531, at
   temperature 1; cut to the likeliest tokens as in Peng et al. 2024, arXiv 2410.16215).
3. OUTPUT/model: configuration and int8 weights (`scspec.int8`), and OUTPUT/log.json: what was run, losses, agreement.

Not covered: exact arithmetic. The texts are material, whatever rounding they were drawn with.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from instructions import instructions
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from scspec.int8 import from_int8, to_int8
from scspec.models import load_tokenizer, local_folder
from scspec.prompts import encode_turn
from scspec.provenance import device_name, sha256_of

TARGET = "smollm2-135m"
LIKELIEST = 16  # tokens of the target's distribution that are kept, and drawn from
TEMPERATURES = (0.0, 0.5, 1.0)  # each for a third of the texts: greedy text is what greedy decoding meets
STUDENT = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 5, "num_attention_heads": 3}
KEYS = {"num_key_value_heads": 1, "head_dim": 64}
PEAK_RATE, WARM_UP_STEPS, WEIGHT_DECAY, CLIP = 2e-3, 300, 0.1, 1.0
HEAD_ROWS = 8192  # positions whose logits exist at a time


class Writer:
    """The target, a token at a time for many texts at once, all at one position: no padding, no masks."""

    def __init__(self, device: torch.device, texts: int, length: int):
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(local_folder(TARGET), dtype=dtype).to(device).eval()
        config, self.device = self.model.config, device
        shape = (2, texts, config.num_key_value_heads, length, config.head_dim)
        self.caches = [torch.empty(shape, dtype=dtype, device=device) for _ in self.model.model.layers]
        positions = torch.arange(length, device=device)[None]
        cos, sin = self.model.model.rotary_emb(self.caches[0], positions)
        self.rotations = cos[0], sin[0]

    def logits(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Return logits (B, V) after tokens (B,), which stand at `position` of their texts."""
        llama = self.model.model
        x = llama.embed_tokens(tokens)
        cos, sin = (table[None, position : position + 1] for table in self.rotations)
        for layer, cache in zip(llama.layers, self.caches, strict=True):
            attention, rows = layer.self_attn, layer.input_layernorm(x)
            _, count, heads, _, width = cache.shape
            # The queries that share a key head stand as rows of one query.
            query = attention.q_proj(rows).view(count, heads, -1, width)
            key = attention.k_proj(rows).view(count, heads, 1, width)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            cache[0, :, :, position] = key[:, :, 0]
            cache[1, :, :, position] = attention.v_proj(rows).view(count, heads, width)
            seen = cache[:, :, :, : position + 1]
            mixed = functional.scaled_dot_product_attention(query, seen[0], seen[1])
            x = x + attention.o_proj(mixed.reshape(count, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(llama.norm(x))

    @torch.inference_mode()
    def write(self, starts: list[tuple[list[int], bool]], turn_end: list[int], seed: int) -> dict[str, torch.Tensor]:
        """Return texts that begin with `starts`: (ids, whether the instruction is complete), the target's from there.

        Keys: tokens int32 (B, T); likeliest int32 and probabilities float16 (B, T, 16), of the token after each
        position; learn bool (B, T): whether the target drew that token. An incomplete instruction, once ended by the
        first of `turn_end`, is followed by the rest of it; a second end ends the text.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        count, length = self.caches[0].shape[1], self.caches[0].shape[3]
        given, lengths, answering = _columns(starts, length, self.device)
        forced = torch.full(
            (count,), len(turn_end), device=self.device
        )  # next of turn_end to force; none at its length
        following = torch.tensor([*turn_end[1:], turn_end[0]], device=self.device)
        temperatures = torch.tensor(TEMPERATURES, device=self.device)
        temperatures = temperatures[torch.arange(count, device=self.device) % len(TEMPERATURES), None]
        ended = torch.zeros(count, dtype=torch.bool, device=self.device)
        tokens, columns = given[:, 0], []
        for position in range(length - 1):
            values, likeliest = self.logits(tokens, position).topk(LIKELIEST)
            noise = torch.rand(values.shape, generator=generator, device=self.device)
            gumbel = -torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7)))
            heat = torch.where(answering[:, None], temperatures, 1.0)  # instructions are to differ
            drawn = likeliest.gather(1, (values.float() + heat * gumbel).argmax(1, keepdim=True))[:, 0]
            begun, forcing = position + 1 >= lengths, forced < len(turn_end)
            learn = begun & ~forcing & ~ended
            columns.append((tokens, likeliest, values.float().softmax(-1), learn))
            following_token = torch.where(forcing, following[(forced - 1).clamp(0, len(turn_end) - 1)], drawn)
            tokens = torch.where(begun, following_token, given[:, position + 1])
            closes = learn & (drawn == turn_end[0])
            ended |= closes & answering
            forced = torch.where(closes & ~answering, 1, torch.where(forcing, forced + 1, forced))
            answering |= closes
        tokens, likeliest, probabilities, learn = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        kept = {"tokens": tokens.int(), "likeliest": likeliest.int(), "probabilities": probabilities.half()}
        return {**kept, "learn": learn}


def _columns(starts, length: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the given ids (B, length), zeros after them, how many they are, and whether the answer has begun."""
    given = torch.zeros(len(starts), length, dtype=torch.long)
    for row, (ids, _) in enumerate(starts):
        given[row, : len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids, _ in starts])
    answering = torch.tensor([complete for _, complete in starts])
    return given.to(device), lengths.to(device), answering.to(device)


def starts_of_texts(tokenizer, count: int, longest: int, seed: int) -> tuple[list[tuple[list[int], bool]], list[int]]:
    """Return (starts, turn_end): what `count` texts begin with, of at most `longest` tokens; ids between two turns."""
    turn_end = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    starts = []
    for text, complete in instructions(2 * count, seed):
        ids = encode_turn(tokenizer, [], text)
        if ids[-len(turn_end) :] != turn_end:
            raise ValueError(f"{TARGET}: its chat template ends a turn with {ids[-len(turn_end) :]}, not {turn_end}")
        ids = ids if complete else ids[: -len(turn_end)]
        if len(ids) <= longest:
            starts.append((ids, complete))
    return starts[:count], turn_end


def write_texts(options: argparse.Namespace) -> list[Path]:
    """Return the files of texts, one a shard, those that are missing written; the last is held out."""
    files = [options.output / f"texts-{shard:03}.safetensors" for shard in range(options.shards)]
    missing = [shard for shard, file in enumerate(files) if not file.exists()]
    if not missing:
        return files
    writer = Writer(options.device, options.texts, options.length + 1)
    tokenizer = load_tokenizer(TARGET)
    for shard in missing:
        began, seed = time.perf_counter(), options.seed * 100_000 + shard
        starts, turn_end = starts_of_texts(tokenizer, options.texts, 2 * options.length // 3, seed)
        texts = writer.write(starts, turn_end, seed)
        _save(files[shard], lambda scratch, texts=texts: save_file(texts, scratch))
        learnt = int(texts["learn"].sum())
        print(f"shard {shard}: {learnt} tokens to learn, {time.perf_counter() - began:.1f} s", flush=True)
    return files


def _save(file: Path, write) -> None:
    scratch = file.with_name(f".{file.name}.part")
    write(scratch)
    os.replace(scratch, file)


class Likeliest(torch.autograd.Function):
    """Cross-entropy, in nats a position, of the student's distribution against the target's likeliest tokens.

    hidden (N, D) @ embedding.T (D, V) are the logits, which exist for HEAD_ROWS positions at a time, and whose gradient
    (Q - P) is formed where they stand. likeliest (N, K) int, probabilities (N, K).
    """

    @staticmethod
    def forward(context, hidden, embedding, likeliest, probabilities):
        half = torch.float16 if hidden.device.type == "cuda" else torch.float32
        rows, table = hidden.to(half), embedding.to(half)
        for_hidden, for_embedding = torch.empty_like(rows), torch.zeros_like(embedding, dtype=torch.float32)
        loss = torch.zeros((), device=hidden.device)
        for part in torch.arange(len(rows), device="cpu").split(HEAD_ROWS):
            part = slice(int(part[0]), int(part[-1]) + 1)
            ids, wanted = likeliest[part].long(), probabilities[part]
            found = functional.softmax(rows[part] @ table.T, -1)
            loss -= (wanted.float() * found.gather(1, ids).float().clamp_min(1e-7).log()).sum()
            found.scatter_add_(1, ids, -wanted.to(half))
            for_hidden[part] = found @ table
            for_embedding += found.T @ rows[part]
        context.save_for_backward(for_hidden, for_embedding)
        return loss / len(rows)

    @staticmethod
    def backward(context, gradient):
        for_hidden, for_embedding = context.saved_tensors
        scale = gradient / len(for_hidden)
        return for_hidden.float() * scale, for_embedding * scale, None, None


def new_student(seed: int) -> LlamaForCausalLM:
    """Return the untrained student on the CPU, float32; its embeddings are the target's, projected."""
    target = AutoModelForCausalLM.from_pretrained(local_folder(TARGET), dtype=torch.float32)
    kept = ("vocab_size", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "bos_token_id", "eos_token_id")
    config = LlamaConfig(
        **STUDENT, **KEYS, **{key: getattr(target.config, key) for key in kept}, tie_word_embeddings=True
    )
    torch.manual_seed(seed)
    student = LlamaForCausalLM(config)
    embedding = target.get_input_embeddings().weight.detach()
    values, vectors = torch.linalg.eigh((embedding.T @ embedding).double())
    directions = vectors[:, values.argsort(descending=True)[: config.hidden_size]].float()
    student.get_input_embeddings().weight.data = embedding @ directions
    return student


def train(files: list[Path], options: argparse.Namespace) -> tuple[LlamaForCausalLM, list[dict]]:
    """Return the trained student and the log of its losses; goes on from OUTPUT/student.pt if it is there."""
    shards = [load_file(file, device=str(options.device)) for file in files[:-1]]
    texts = {name: torch.cat([shard.pop(name) for shard in shards]) for name in list(shards[0])}
    held_out = load_file(files[-1], device=str(options.device))
    student = new_student(options.seed).to(options.device)
    matrices = [parameter for parameter in student.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in student.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=options.device.type == "cuda")
    saved, log, first = options.output / "student.pt", [], 0
    if saved.exists():
        state = torch.load(saved, map_location=options.device)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        log, first = state["log"], state["step"]
    began, losses = time.perf_counter(), []
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        batch = _batch(texts, step, options)
        losses.append(loss_of(student, batch))
        losses[-1].backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[-1] = losses[-1].detach()
        if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
            entry = {"step": step + 1, "cross_entropy": float(torch.stack(losses).mean())}
            entry |= {"train_s": time.perf_counter() - began, **agreement(student, held_out, options)}
            began, losses = time.perf_counter(), []
            log.append(entry)
            print(json.dumps(entry), flush=True)
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "log": log, "step": step + 1}
            _save(saved, lambda scratch, state=state: torch.save(state, scratch))
    return student, log


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of step 0..steps - 1: up in a line, then down along half a cosine to a hundredth."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(steps - WARM_UP_STEPS, 1)
    return PEAK_RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _batch(texts: dict[str, torch.Tensor], step: int, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return the texts of a step: each epoch has all of them once, in an order of its own."""
    count = len(texts["tokens"])
    epoch, place = divmod(step, count // options.batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed * 100_000 + epoch))
    rows = order[place * options.batch : (place + 1) * options.batch].to(options.device)
    return {name: tensor[rows] for name, tensor in texts.items()}


def hidden_states(student: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the last hidden states (N, D) at the positions to learn."""
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16):
        states = student.model(input_ids=batch["tokens"].long(), use_cache=False).last_hidden_state
    return states[batch["learn"]]


def loss_of(student: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy over a batch's positions to learn."""
    wanted = (batch[name][batch["learn"]] for name in ("likeliest", "probabilities"))
    return Likeliest.apply(hidden_states(student, batch), student.get_input_embeddings().weight, *wanted)


@torch.no_grad()
def agreement(student: LlamaForCausalLM, texts: dict[str, torch.Tensor], options: argparse.Namespace) -> dict:
    """Return the share of positions where student and target think the same token likeliest, by temperature."""
    found, rows = [], torch.arange(len(texts["tokens"]), device=options.device)
    for part in rows.split(options.batch):
        batch = {name: tensor[part] for name, tensor in texts.items()}
        states = hidden_states(student, batch).float()
        table = student.get_input_embeddings().weight
        best = torch.cat([(some @ table.T).argmax(-1) for some in states.split(HEAD_ROWS)])
        found.append((best == batch["likeliest"][..., 0][batch["learn"]]).float())
    same = torch.cat(found)
    of_row = (rows % len(TEMPERATURES))[:, None].expand_as(texts["learn"])[texts["learn"]]
    return {f"agreement_{value}": float(same[of_row == index].mean()) for index, value in enumerate(TEMPERATURES)}


def write_model(student: LlamaForCausalLM, log: list[dict], options: argparse.Namespace) -> None:
    """Write OUTPUT/model and OUTPUT/log.json; agreement is measured once more with the rounded weights."""
    folder = options.output / "model"
    folder.mkdir(exist_ok=True)
    state = student.state_dict()
    state.pop("lm_head.weight")
    stored = to_int8(state)
    save_file(stored, folder / "model.safetensors", {"format": "scspec-int8"})
    config = student.config.to_dict() | {"architectures": [type(student).__name__], "dtype": "float32"}
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    student.load_state_dict(from_int8(stored), strict=False)
    held_out = load_file(options.output / f"texts-{options.shards - 1:03}.safetensors", device=str(options.device))
    facts = {
        "target": TARGET,
        "options": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "recipe": {file.name: sha256_of(file) for file in sorted(Path(__file__).parent.glob("*.[py]*"))},
        "device": device_name(options.device.type),
        "torch": torch.__version__,
        "bytes": (folder / "model.safetensors").stat().st_size,
        "sha256": sha256_of(folder / "model.safetensors"),
        "int8": agreement(student.to(options.device), held_out, options),
        "losses": log,
    }
    (options.output / "log.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps({name: value for name, value in facts.items() if name != "losses"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="a folder; what it holds of an earlier run is gone on with")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=40, help="files of texts, the last of them held out")
    parser.add_argument("--texts", type=int, default=4096, help="texts a shard, written side by side")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text, the instruction's among them")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--batch", type=int, default=128, help="texts a step")
    parser.add_argument("--log-every", type=int, default=500, help="steps between two checkpoints")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    files = write_texts(options)
    print(f"texts: {time.perf_counter() - began:.0f} s", flush=True)
    write_model(*train(files, options), options)


if __name__ == "__main__":
    main()
