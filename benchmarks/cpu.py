"""Speed of SmolLM2-135M in SC on the CPU: verify passes of 5 fresh tokens, against what its look-ups alone allow.

    python benchmarks/cpu.py [--threads N] [--repeats 20]

Correctness first: the pass is compared bit for bit with the same tokens fed one by one. Then, alternating in one run,
medians of:
    pass            a forward of 5 new tokens at 64..., everything included
    look-up loop    only `look_up`: each weight byte of every SC linear layer looked up once per group of four rows
    counts          `unit_sums`: the same with the tables it needs
    float32         the plain Hugging Face model's forward of 5 new tokens at the same length (sdpa, DynamicCache)
Every pass takes other tokens, and all 106 M weights pass through the caches between two uses of one.
"""

import argparse
import statistics
import time

import numba
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from scspec.models import load_model, local_folder
from scspec.provenance import device_name, versions
from scspec.sc import cpu
from scspec.sc.linear import SCLinear, stream_spec
from scspec.sc.streams import count_table, ones_table

ROWS, CONTEXT, STOC_LEN = 5, 64, 128


@numba.njit(parallel=True, cache=True)
def look_up_layer(tables, words, groups, out):
    """Look up every word of one layer once per group of rows: the innermost loop and nothing else."""
    units = words.shape[0] // 8
    for item in numba.prange(groups * units):
        for block in range(8):
            cpu.look_up(tables, words[(item % units) * 8 + block], out[item])


def prepared_layers(model, rows: int):
    """Return [(PackedWeight, signed ones, output buffer)] of every SC linear layer, for `rows` random rows."""
    spec, layers = stream_spec(model.sc_knobs), []
    for module in model.modules():
        if isinstance(module, SCLinear) and module.switch == "use_sc_linear":
            weight = module._prepared
            x = torch.randn(rows, weight.depth).numpy()
            ones, _ = cpu.encode_rows(x, ones_table(spec), weight.chunk_d, weight.units_per_chunk)
            out = torch.zeros(ones.shape[0] * weight.words.shape[0] // 8, weight.words.shape[1], dtype=torch.int64)
            layers.append((weight, ones, out.numpy()))
    return layers, count_table(spec)


def measurements(model, plain, tokens):
    """Return {name: a function to time}; each call takes the next 5 of `tokens`."""
    layers, counts_of = prepared_layers(model, ROWS)
    tables = torch.randint(-9, 9, (8, 256)).numpy()
    groups = -(-ROWS // cpu.ROWS)
    cache = model.new_kv_cache(1, CONTEXT + ROWS)
    model(input_ids=tokens[:, :CONTEXT], kv_cache=cache)
    plain_cache = DynamicCache(config=plain.config)
    plain(input_ids=tokens[:, :CONTEXT], past_key_values=plain_cache)
    fresh = iter(tokens[:, CONTEXT:].split(ROWS, dim=1))

    def sc_pass():
        cache.length = CONTEXT
        model(input_ids=next(fresh), kv_cache=cache)

    def float_pass():
        plain(input_ids=next(fresh), past_key_values=plain_cache)
        plain_cache.crop(-ROWS)

    def loop():
        for weight, _, out in layers:
            look_up_layer(tables, weight.words, groups, out)

    def counts():
        for weight, ones, _ in layers:
            cpu.unit_sums(ones, weight.words, counts_of, weight.units_per_chunk)

    return {"pass": sc_pass, "look-up loop": loop, "counts": counts, "float32": float_pass}


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
        print(f"{name:13} {seconds * 1e3:7.1f} ms ({spread})  {ROWS / seconds:7.1f} rows/s")
    print(f"speed of the pass / speed the look-up loop alone allows: {median['look-up loop'] / median['pass']:.2f}")
    print(f"speed of the pass / speed the counts alone allow:        {median['counts'] / median['pass']:.2f}")


if __name__ == "__main__":
    main()
