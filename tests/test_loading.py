"""Loading layer by layer: the bits of transformers' own loading, in the memory of the packed weights."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from scspec.models import load_model
from scspec.patching import patch_model

IDS = torch.tensor([[3, 14, 15]])


def saved(folder, dtype=torch.bfloat16, shard="50GB", **changed) -> str:
    """Write a tiny checkpoint of one layer; return its folder."""
    model = tiny_model(num_hidden_layers=1, **changed)
    model.model.norm.weight.data += torch.rand(40) / 3  # no power of two, so rounding it twice can be seen
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device)).logits


def check_bits(folder, overrides=None, **options):
    """What is loaded layer by layer computes what the whole model, loaded by transformers and patched, does."""
    found = load_model(folder, sc_overrides=overrides, **options)
    placed = {"device": options.get("device"), "backend": options.get("backend")}
    dtype = options.get("dtype", torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    wanted = patch_model(whole, overrides, **placed)
    assert (found.dtype, found.config.dtype) == (wanted.dtype, wanted.config.dtype) == (dtype, dtype)
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert all(buffer.dtype == torch.float32 for buffer in found.buffers())
    assert torch.equal(logits(found), logits(wanted))


@pytest.mark.parametrize("shard", ["50GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_loading_gives_the_bits_of_transformers(tmp_path, stored, tied, shard):
    folder = saved(tmp_path, stored, shard, tie_word_embeddings=tied, eos_token_id=[1, 7])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    check_bits(folder)
    check_bits(folder, "float")


@pytest.mark.usefixtures("wide_steps")
@pytest.mark.parametrize("overrides", [None, "float", "published"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loading_in_half_precision_gives_the_bits_of_transformers(tmp_path, tied, overrides):
    """`published` keeps Hugging Face's rotary module, whose frequencies may not be rounded (its buffers)."""
    folder = saved(tmp_path, torch.float32, tie_word_embeddings=tied)
    check_bits(folder, overrides, dtype=torch.float16, device=str(DEVICE), backend="triton")


def test_weights_in_several_dtypes_are_rounded_once(tmp_path):
    """float32 norms in a bfloat16 file."""
    folder = saved(tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    halves = {key: value if value.ndim == 1 else value.bfloat16() for key, value in tensors.items()}
    save_file(halves, tmp_path / "model.safetensors", {"format": "pt"})
    check_bits(folder)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_tied_weights_stay_one_tensor_where_floats_are_kept(tmp_path, stored):
    model = load_model(saved(tmp_path, stored, tie_word_embeddings=True), keep_float_weights=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_no_file_stays_mapped(tmp_path, stored):
    """One norm or bias that still lies in it would keep all of it."""
    model = load_model(saved(tmp_path, stored, attention_bias=True, mlp_bias=True))
    assert model.dtype == torch.float32
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"), r"missing.*model\.layers\.0\.mlp\.up_proj"),
        (lambda tensors: tensors.update({"model.extra": torch.ones(3)}), r"unexpected.*model\.extra"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(41)}), r"mismatched.*model\.norm\.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(40, dtype=torch.int8)}), "weights in .*I8"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change, message):
    folder = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_model(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        load_model(str(tmp_path))


# ---------------------------------------------------------------------------------------------- memory

LAYERS, VOCAB, HIDDEN, INNER = 24, 1000, 512, 1536
LAYER = 2 * HIDDEN * HIDDEN + 2 * 128 * HIDDEN + 3 * HIDDEN * INNER  # weights of a layer
SHARD_MB = 20
LOAD = """
import json, sys
from scspec.models import load_model
small, large, skipped = sys.argv[1:]
load_model(small)  # what is imported and compiled once
for _ in range(2):
    print(flush=True)
    sys.stdin.readline()
    model = load_model(large, skip_layers=json.loads(skipped))
"""


def memory_mb(pid: int) -> dict[str, float]:
    """Return what a process holds, by where from: RssAnon its own memory, RssFile pages of mapped files."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) / 1e3 for line in lines if line[0] in ("RssAnon:", "RssFile:")}


def peaks_mb(*arguments: str) -> dict[str, float]:
    """Return by how much each kind of memory grew at most while the large checkpoint was loaded."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        before, done, peaks = memory_mb(process.pid), threading.Event(), {}

        def watch():
            while not done.is_set():
                for kind, size_mb in memory_mb(process.pid).items():
                    peaks[kind] = max(peaks.get(kind, 0.0), size_mb - before[kind])
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.stdin.write("\n")
        process.stdin.flush()
        loaded = process.stdout.readline()
        done.set()
        watcher.join()
        process.kill()
    assert loaded == "\n"
    return peaks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a checkpoint of one layer and of one of 24, bfloat16 in shards of 20 MB."""
    shapes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": 64, "num_attention_heads": 8}
    folders = []
    for layers in (1, LAYERS):
        config = tiny_config(**shapes, num_hidden_layers=layers, vocab_size=VOCAB, dtype="bfloat16")
        folders.append(tmp_path_factory.mktemp("checkpoint"))
        LlamaForCausalLM(config).bfloat16().save_pretrained(folders[-1], max_shard_size=f"{SHARD_MB}MB")
    return [str(folder) for folder in folders]


def test_floats_are_there_one_group_at_a_time(checkpoints):
    """A process's own memory stays below the packed weights, one group's floats and codes, and the ends of the model.

    Packed: a byte a weight, and a float32 scale for 128. The largest group, gate and up: of each weight a float (4
    bytes), its code as int16 (2), as a byte and in words, before and after the chunks are joined (3). Embeddings and
    LM head: float32, the head a second time while it is packed. 25 MB for the allocator. A float32 copy of the model
    is larger than all of that; a copy of the bfloat16 file, beside the packed weights, too. Of the files, no more than
    the shards in use are mapped: one being packed, and two that hold embeddings and LM head.
    """
    packed_mb = LAYERS * LAYER * (1 + 4 / 128) / 1e6
    allowed_mb = packed_mb + 2 * HIDDEN * INNER * (4 + 2 + 3) / 1e6 + 3 * VOCAB * HIDDEN * 4 / 1e6 + 25
    assert LAYERS * LAYER * 2 / 1e6 + packed_mb > 1.5 * allowed_mb, "a copy would go unseen"
    peaks = peaks_mb(*checkpoints, "[]")
    assert packed_mb < peaks["RssAnon"] < allowed_mb
    assert peaks["RssFile"] < 4 * SHARD_MB < 0.6 * LAYERS * LAYER * 2 / 1e6


def test_layers_left_out_are_not_read(checkpoints):
    """All but the first: of the files no more is in memory than the shards of that layer, embeddings and LM head."""
    peaks = peaks_mb(*checkpoints, json.dumps(list(range(1, LAYERS))))
    assert peaks["RssFile"] < 3 * SHARD_MB < 0.5 * LAYERS * LAYER * 2 / 1e6
