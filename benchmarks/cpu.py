"""Speed of SmolLM2-135M in SC on the CPU: verify passes of 5 fresh tokens, against what its look-ups alone allow.

    python benchmarks/cpu.py [--threads N] [--repeats 20]

Correctness first: the pass is compared bit for bit with the same tokens fed one by one. Then, alternating in one run,
medians of:
    pass              a forward of 5 new tokens at 64..., everything included
    look-ups, plain   the yardstick, `look_up` alone: each weight byte of every SC linear layer, once per four rows
    look-ups, hinted  the same loop as the engine runs it, told which words come next
    counts            `run_sums`: the hinted loop with the tables it needs
    float32           the plain Hugging Face model's forward of 5 new tokens at the same length (sdpa, DynamicCache)
Every pass takes other tokens, and all 106 M weights pass through the caches between two uses of one.
"""

import argparse
import statistics
import time

import numba
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from scspec.jit import compiled
from scspec.models import load_model, local_folder
from scspec.provenance import device_name, versions
from scspec.sc import cpu
from scspec.sc.knobs import stream_spec
from scspec.sc.linear import SCLinear
from scspec.sc.streams import ones_table

ROWS, CONTEXT, STOC_LEN = 5, 64, 128


@compiled(parallel=True)
def look_up_layer(tables, words, ahead, out):
    """Look up every word of one layer, once for each group of rows in out int64 (groups, runs, M)."""
    runs = out.shape[1]
    for item in numba.prange(out.shape[0] * runs):
        first = item % runs * cpu.RUN
        for word in range(first, min(first + cpu.RUN, words.shape[0])):
            coming = words[min(word + ahead, words.shape[0] - 1)]
            cpu.look_up(tables, words[word], coming, out[item // runs, item % runs])


def prepared_layers(model, rows: int):
    """Return [(PackedWeight, signed ones, output buffer)] of every packed weight of SC linears, for random rows."""
    ones_of, layers = ones_table(stream_spec(model.sc_knobs)), {}
    for module in model.modules():
        if isinstance(module, SCLinear) and module.switch == "use_sc_linear" and module.shared not in layers:
            weight = module.shared.weight
            words, columns = weight.words.shape
            ones, _ = cpu.encode_rows(torch.randn(rows, weight.depth).numpy(), ones_of, weight.chunk_d, words)
            out = torch.zeros(ones.shape[0], -(-words // cpu.RUN), columns, dtype=torch.int64).numpy()
            layers[module.shared] = weight, ones, out
    return list(layers.values())


def measurements(model, plain, tokens):
    """Return {name: a function to time}; each call takes the next 5 of `tokens`."""
    layers, counts_of = prepared_layers(model, ROWS), cpu.counts_by_magnitude(stream_spec(model.sc_knobs))
    tables = torch.randint(-9, 9, (8, 256)).numpy()
    cache = model.new_kv_cache(1, CONTEXT + ROWS)
    model(input_ids=tokens[:, :CONTEXT], kv_cache=cache)
    plain_cache = DynamicCache(config=plain.config)
    plain(input_ids=tokens[:, :CONTEXT], past_key_values=plain_cache)
    fresh = iter(tokens[:, CONTEXT:].split(ROWS, dim=1))

    def sc_pass():
        cache.rollback(0, CONTEXT)
        model(input_ids=next(fresh), kv_cache=cache)

    def float_pass():
        plain(input_ids=next(fresh), past_key_values=plain_cache)
        plain_cache.crop(-ROWS)

    def loop(ahead):
        for weight, _, out in layers:
            look_up_layer(tables, weight.words, ahead, out)

    def counts():
        for weight, ones, _ in layers:
            cpu.run_sums(ones, ROWS, weight.words, counts_of, -(-weight.chunk_d // 8))

    return {
        "pass": sc_pass,
        "look-ups, plain": lambda: loop(0),
        "look-ups, hinted": lambda: loop(1),
        "counts": counts,
        "float32": float_pass,
    }


def check(model, tokens) -> None:
    """Raise unless a pass of 5 rows has the bits of five passes of 1."""
    ids = tokens[:, :ROWS]
    cache = model.new_kv_cache(1, ROWS)
    alone = torch.cat([model(input_ids=token, kv_cache=cache).logits for token in ids.split(1, dim=1)], dim=1)
    if not torch.equal(alone, model(input_ids=ids).logits):
        raise SystemExit("a pass of 5 rows differs from five passes of 1: no speed is measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    numba.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = load_model("smollm2-135m", sc_overrides={"sc_stoc_len": STOC_LEN})
    plain = AutoModelForCausalLM.from_pretrained(local_folder("smollm2-135m"), dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (1, CONTEXT + 3 * ROWS * (arguments.repeats + 2)))
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        check(model, tokens)
        functions = measurements(model, plain, tokens)
        for repeat in range(arguments.repeats + 1):
            for name, function in functions.items():
                began_s = time.perf_counter()
                function()
                if repeat:  # the first round compiles and warms up
                    times.setdefault(name, []).append(time.perf_counter() - began_s)
    found = versions()
    print(f"{device_name('cpu')}, {arguments.threads} threads, torch {found['torch']}, numba {found['numba']}")
    print(f"SmolLM2-135M, stoc_len {STOC_LEN}, {ROWS} rows, {CONTEXT} cached; bit-equal to single rows: yes")
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in median.items():
        spread = f"{min(times[name]) * 1e3:.1f} to {max(times[name]) * 1e3:.1f}"
        print(f"{name:17} {seconds * 1e3:7.1f} ms ({spread})  {ROWS / seconds:7.1f} rows/s")
    for name in ("look-ups, plain", "look-ups, hinted", "counts"):
        print(f"speed of the pass / speed that the {name} alone allow: {median[name] / median['pass']:.2f}")


if __name__ == "__main__":
    main()
