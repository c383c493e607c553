"""Files of weights in other formats -> the folder that transformers reads."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scspec.int8 import from_int8


def convert_int8(weights: Path, folder: Path) -> None:
    """Write the float32 safetensors of a file of int8 weights (`int8`) into `folder`."""
    save_file(from_int8(load_file(weights)), folder / "model.safetensors", {"format": "pt"})


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and float32 safetensors of a GGUF file into `folder`."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [type(model).__name__]}, indent=1))
    model.generation_config.save_pretrained(folder)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
