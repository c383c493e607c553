"""Speed of the GPU engine against the copy bandwidth of the same run. Counts are checked first.

    python benchmarks/gpu.py [--backend cuda] [--tau 3] [--only 1B 8B] [--json FILE]

Weights are random, at least 256 MB of them in turn, so that none stays in the L2 cache. A time is the median of 20
replays of a CUDA graph that holds one pass over all of them. Forwards are whole models at the shapes of Llama-3.2-1B
and Llama-3.1-8B (random weights, float16, LM head included) with 256 cached tokens. Speculative decoding replays
acceptance patterns that emit `tau` tokens a block on average: random weights agree about nothing.
"""

import argparse
import json
import math
import statistics
import time
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scspec.decoding import CachedScorer, Draws, SamplingConfig, decode_batch, speculative
from scspec.decoding.request import Turn
from scspec.decoding.verification import Greedy
from scspec.models import load_model
from scspec.patching import patch_model
from scspec.sc.device import CHUNK, RUN, PackedWeight
from scspec.sc.encoding import encode
from scspec.sc.matmul import backend_module, chunk_slices, sc_matmul
from scspec.sc.streams import resolve_streams

CONTEXT, GAMMA, REPEATS, ROTATED_BYTES = 256, 4, 20, 256 * 2**20
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32, "max_position_embeddings": 8192}
SHAPES = {
    "1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True, **LLAMA
    ),
    "8B": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128, **LLAMA),
}
DEVICE = torch.device("cuda:0")


class Report:
    """Prints each line as it comes and keeps it."""

    def __init__(self):
        self.lines: dict[str, float] = {}

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.lines[name] = value
        print(f"{name:58} {value:10.4f} {unit:8} {note}", flush=True)


def milliseconds(function, per: int = 1) -> float:
    """Return the median time of one replay of `function` as a graph, divided by `per`."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return replay_milliseconds(graph.replay) / per


def replay_milliseconds(function) -> float:
    """Return the median time of a call, by events on the device."""
    times = []
    for repeat in range(REPEATS + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        function()
        ended.record()
        ended.synchronize()
        if repeat >= 3:
            times.append(began.elapsed_time(ended))
    return statistics.median(times)


def check_counts(backend: str) -> None:
    """Raise unless the packed linear layer has the bits of `sc_matmul` on the CPU: odd sizes, saturated codes."""
    for rows, depth, outputs, length in [(1, 4096, 130, 128), (3, 576, 70, 64), (8, 200, 33, 32), (17, 130, 50, 256)]:
        for saturated in (False, True):
            x, weight = torch.randn(rows, depth), torch.randn(outputs, depth)
            x, weight = (x.sign(), weight.sign()) if saturated else (x, weight)
            spec = resolve_streams("bipolar", 8, length, None, True)
            codes = [encode(weight[:, s].to(DEVICE), spec, "per_row") for s in chunk_slices(depth, CHUNK)]
            options = {"chunk_d": CHUNK, "stoc_len": length, "halve_bipolar_stoc_len": True}
            wanted = sc_matmul(x, weight, backend="cpu", **options)
            packed = PackedWeight.pack(codes)
            found = backend_module(backend).linear(x.to(DEVICE), packed, spec, out_dtype=torch.float32)
            if not torch.equal(found.cpu(), wanted):
                raise SystemExit(f"{backend}: counts differ at {rows} x {depth} x {outputs}, stoc_len {length}")


def copy_terabytes_per_s() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 2**30 / milliseconds(lambda: target.copy_(source)) / 1e9


def random_weight(outputs: int, depth: int) -> PackedWeight:
    chunks = -(-depth // CHUNK)
    codes = torch.randint(0, 256, (chunks * CHUNK // RUN, outputs, RUN), dtype=torch.uint8, device=DEVICE)
    return PackedWeight(codes, torch.rand(chunks, outputs, device=DEVICE), outputs, depth)


def measure_linears(report: Report, backend: str, lengths: list[int]) -> None:
    linear = backend_module(backend).linear
    for outputs, depth in [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]:
        copies = max(2, math.ceil(ROTATED_BYTES / (outputs * depth)))
        weights = [random_weight(outputs, depth) for _ in range(copies)]
        for length in lengths if outputs == depth else lengths[:1]:
            spec = resolve_streams("bipolar", 8, length, None, True)
            for rows in (1, 5, 8, 16, 512) if outputs == depth else (1, 5):
                x = torch.randn(rows, depth, device=DEVICE).half()
                used = weights if rows < 512 else weights[:4]
                ms = milliseconds(lambda: [linear(x, w, spec, out_dtype=x.dtype) for w in used], len(used))  # noqa: B023
                report.add(f"linear {depth} -> {outputs}, {rows} rows, stoc_len {length}", ms, "ms")


def random_model(name: str, backend: str, length: int):
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with DEVICE:
            model = LlamaForCausalLM(SHAPES[name])
    finally:
        torch.set_default_dtype(before)
    return patch_model(model, {"sc_stoc_len": length}, backend=backend)


def measure_forward(report: Report, model, name: str, length: int) -> None:
    for batch, rows in ((1, 1), (1, 5), (16, 1), (16, 5)):
        cache = model.new_kv_cache(batch, CONTEXT + 64)
        for slot in range(batch):
            tokens = torch.randint(0, 1000, (1, CONTEXT), device=DEVICE)
            model(input_ids=tokens, kv_cache=cache.slot(slot), logits_to_keep=1)
        ids = torch.randint(0, 1000, (batch, rows), device=DEVICE)

        def step():
            model(input_ids=ids, kv_cache=cache, logits_to_keep=rows)  # noqa: B023
            for slot in range(batch):  # noqa: B023
                cache.rollback(slot, CONTEXT)  # noqa: B023

        for _ in range(2):
            step()
        ms = replay_milliseconds(step)
        report.add(f"forward {name}, {batch} x {rows} rows, stoc_len {length}", ms, "ms", "the host's share included")


def measure_prefill(report: Report, model, name: str, length: int) -> None:
    ids = torch.randint(0, 1000, (1, 512), device=DEVICE)
    cache = model.new_kv_cache(1, 512)

    def prefill():
        cache.rollback(0, 0)
        model(input_ids=ids, kv_cache=cache, logits_to_keep=1)

    prefill()
    report.add(f"prefill {name}, 512 tokens, stoc_len {length}", replay_milliseconds(prefill), "ms")


def accepting(tau: float, generator: torch.Generator):
    """Return a Greedy that accepts each proposal with the probability at which blocks emit `tau` tokens on average."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(GAMMA + 1)) < tau else (low, middle)

    class Replayed(Greedy):
        def verify(self, logits):
            for verdict in super().verify(logits).values():
                refused = (torch.rand(GAMMA, generator=generator) >= low).tolist()
                verdict.accepted = (*refused, True).index(True)
                verdict.emitted = [*verdict.proposed[: verdict.accepted], verdict.p[verdict.accepted]]
            return self.verdicts

    return Replayed


def measure_decoding(report: Report, target, draft, name: str, batch: int, tau: float | None, blocks: int = 24) -> None:
    capacity = CONTEXT + (blocks + 8) * (GAMMA + 1)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 1000, (batch, CONTEXT), generator=generator).tolist()
    budget = capacity - CONTEXT - GAMMA - 1
    conversations = [(turn for turn in [Turn(ids, budget, Draws(0))]) for ids in prompts]
    rule = Greedy if tau is None else accepting(tau, generator)
    emitted, measured, began_s, warm = 0, 0, 0.0, 3 * batch
    with mock.patch.object(speculative, "Greedy", rule):
        scorers = CachedScorer(target, capacity, batch), CachedScorer(draft, capacity, batch)
        arguments = {"gamma": GAMMA, "sampling": SamplingConfig(), "eos_token_ids": frozenset()}
        for number, (_, _, block) in enumerate(decode_batch(*scorers, conversations, **arguments)):
            if number == warm:
                torch.cuda.synchronize()
                began_s = time.perf_counter()
            elif number > warm:
                emitted, measured = emitted + len(block.emitted), measured + 1
            if number == warm + blocks * batch:
                break
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began_s
    report.add(f"speculative {name}, gamma {GAMMA}, batch {batch}", emitted / seconds, "tokens/s", f"tau {tau}")
    report.add(f"  one block of it, batch {batch}", seconds / measured * batch * 1e3, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--stoc-len", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--tau", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", choices=("linear", "1B", "8B", "smollm2"), default=["linear", "1B", "8B"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if not 1 < arguments.tau < GAMMA + 1:
        parser.error(f"--tau {arguments.tau}: must lie between 1 and gamma + 1 = {GAMMA + 1}")
    torch.manual_seed(0)
    check_counts(arguments.backend)
    report = Report()
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, backend {arguments.backend}; counts equal")
    report.add("copy", copy_terabytes_per_s(), "TB/s")
    if "linear" in arguments.only:
        measure_linears(report, arguments.backend, arguments.stoc_len)
    models = {}
    length = arguments.stoc_len[0]
    with torch.inference_mode():
        for name in [name for name in ("1B", "8B") if name in arguments.only]:
            models[name] = random_model(name, arguments.backend, length)
            measure_forward(report, models[name], name, length)
            measure_prefill(report, models[name], name, length)
        if len(models) == 2:
            torch.cuda.empty_cache()
            report.add("memory of 8B + 1B", torch.cuda.memory_allocated(DEVICE) / 2**30, "GiB")
            for batch in (1, 16):
                measure_decoding(report, models["8B"], models["1B"], "8B / 1B", batch, arguments.tau)
        if "smollm2" in arguments.only:
            options = {"device": "cuda", "dtype": torch.float16, "sc_overrides": {"sc_stoc_len": length}}
            pair = [load_model("smollm2-135m", backend=arguments.backend, **options) for _ in range(2)]
            for batch in (1, 16):
                measure_decoding(report, *pair, "SmolLM2 self pair", batch, None)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(DEVICE), **report.lines}, file, indent=1)


if __name__ == "__main__":
    main()
