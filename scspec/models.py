"""Where weights come from, and how a draft/target pair is loaded.

A model name is an alias (`aliases`: a file pinned by hash), a local folder, or a Hugging Face id. Fetching
(`fetch_model`) is a step of its own that needs the network; loading an alias does not.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scspec.aliases import ALIASES, fetch_alias
from scspec.families import check_config, check_stored_config
from scspec.patching import patch_model
from scspec.placement import Placement, check_placement, layer_devices, resolve_devices
from scspec.provenance import sha256_of
from scspec.sc.knobs import resolve_knobs

#: Whatever a tokenizer may be saved as.
_TOKENIZER_FILES = ("*.model", "merges.txt", "vocab.txt", "tokenizer*")
#: What a model is made of.
_FILES = ("*.json", "*.safetensors", "*.jinja", *_TOKENIZER_FILES)

#: As the header of a safetensors file names them.
_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def fetch_model(name: str) -> dict[str, Any]:
    """Return the manifest of model `name`, fetching it first where it is not here yet.

    Keys: name, source, sha256 (of an alias the GGUF file's, else {file: of the file}, tokenizer included), note. Raises
    ValueError for a name that is neither alias, folder nor a reachable Hugging Face id, for a hash mismatch, and for a
    model that is not modelled, of which nothing but its configuration is fetched.
    """
    if name in ALIASES:
        manifest: dict[str, Any] = json.loads((fetch_alias(name) / "manifest.json").read_text())
        return manifest
    model_config(name)
    folder = local_folder(name)
    _weight_files(name, folder)
    files = {file.name: file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()}
    digest = {key: sha256_of(files[key]) for key in sorted(files)}
    return {"name": name, "source": "folder" if Path(name).is_dir() else "Hugging Face", "sha256": digest, "note": ""}


def local_folder(name: str, files: Sequence[str] = _FILES) -> Path:
    """Return the folder of model `name`, fetched if need be: weights and tokenizer and all, or only those `files`.

    With HF_HUB_OFFLINE=1 nothing asks the hub. Raises ValueError where the model is not to be had.
    """
    if name in ALIASES:
        return fetch_alias(name)
    return Path(name) if Path(name).is_dir() else _fetch_from_hub(name, files)


def _weight_files(name: str, folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model {name!r}: no *.safetensors in it; convert the weights to safetensors first")
    return files


def _fetch_from_hub(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {name!r}: not an alias ({', '.join(ALIASES)}), not a folder, "
            f"and not to be had from Hugging Face: {reason}; {_remedy(name, error)}"
        ) from error


def _remedy(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "ask for access on its page there, then log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return "check the name; one that is private needs: hf auth login"
    return f"fetch it where there is a network: scspec models fetch {name}"


@contextmanager
def _reading(name: str, part: str) -> Iterator[None]:
    """What a library finds wrong with a file of the model, within the block, is one line that names model and part."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if getattr(error, "errno", None):  # the system's fault, and it names the file
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {name!r}: its {part} cannot be read: {reason}; check its files: scspec models verify {name}"
        ) from error


def model_config(name: str) -> PreTrainedConfig:
    """Return the configuration of model `name`; of a model that is not here yet, nothing else is fetched.

    Raises ValueError for one that is missing or broken, or of a model that is not modelled (`families`).
    """
    from huggingface_hub.errors import StrictDataclassError

    folder = local_folder(name, ("config.json",))
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model {name!r}: no config.json in it") from None
    except ValueError as error:
        raise ValueError(f"model {name!r}: config.json is no JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"model {name!r}: config.json holds no object, but {type(stored).__name__}")
    check_stored_config(f"model {name!r}", stored)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"model {name!r}: config.json: {' '.join(str(error).split())}") from error
    check_config(f"model {name!r}", config)
    return config


def vocabulary_size(name: str) -> int:
    """Return how many ids of model `name` are tokens: less than `vocab_size` where it has more logits than tokens.

    Many models pad their vocabulary to a round number. A folder without a tokenizer does not tell: then it is
    `vocab_size`. Raises ValueError as `model_config`.
    """
    size: int = model_config(name).vocab_size
    return min(size, max(_vocabulary(name).values()) + 1) if _tokenizer_state(name) else size


def _tokenizer_state(name: str) -> tuple[tuple[str, int], ...]:
    """Return (path, time of its last change in ns) of each file that the tokenizer of model `name` may be made of."""
    folder = local_folder(name)
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)})
    return tuple((str(file), file.stat().st_mtime_ns) for file in files)


def _vocabulary(name: str) -> dict[str, int]:
    """Return {token: id} of model `name`, not to be changed. Raises ValueError as `load_tokenizer`."""
    return _read_vocabulary(name, _tokenizer_state(name))


@lru_cache(maxsize=8)
def _read_vocabulary(name: str, state: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Reading a tokenizer takes half a second, and checks of a pair ask for it again and again."""
    vocabulary: dict[str, int] = load_tokenizer(name).get_vocab()
    return vocabulary


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: Placement = "cpu",
    backend: str | None = None,
    sc_overrides: dict[str, Any] | str | None = None,
    skip_layers: tuple[int, ...] = (),
    keep_float_weights: bool = False,
) -> PreTrainedModel:
    """Return one patched model instance, ready for decoding.

    name: alias, folder or Hugging Face id.  device: "cpu" (float32) or "cuda" (float32, float16, bfloat16), or several
    GPUs, over which the layers are spread.  backend: of every SC matmul, None for the device's default.  sc_overrides:
    knobs or a preset (`sc.knobs`).  skip_layers: decoder layers left out, counted from 0.  Ids that the tokenizer does
    not have are left out of embeddings and LM head, so that they are never proposed, chosen or counted.
    The files are mapped, not read: each layer's weights come to memory when they are packed, and go again. Raises
    ValueError, before loading weights where an argument is at fault, else if the files do not hold the model's weights.
    """
    check_placement(device, dtype, backend)
    resolve_knobs(sc_overrides)
    layers = model_config(name).num_hidden_layers
    wrong = [index for index in skip_layers if not 0 <= index < layers]
    if wrong or len(set(skip_layers)) >= layers:
        raise ValueError(f"skip_layers={list(skip_layers)}: {name} has layers 0..{layers - 1}, and one must remain")
    layer_devices(layers - len(set(skip_layers)), resolve_devices(device))
    tokens = vocabulary_size(name)
    model = _mapped_model(name)
    _skip_layers(model, set(skip_layers))
    if tokens < model.config.vocab_size:
        _drop_padding(model, tokens)
    return patch_model(
        model, sc_overrides, device=device, dtype=dtype, backend=backend, keep_float_weights=keep_float_weights
    )


def _mapped_model(name: str) -> PreTrainedModel:
    """Return the float model in the dtype of its files: then transformers maps them to memory, and reads nothing."""
    folder = local_folder(name)
    options: dict[str, Any] = {
        "attn_implementation": "eager",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "dtype": _stored_dtype(name, folder),
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    with _reading(name, "*.safetensors"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model: PreTrainedModel
    model, found = loaded
    for fault in ("missing", "unexpected", "mismatched"):
        for key in sorted(map(str, found[f"{fault}_keys"])):
            raise ValueError(f"model {name!r}: {fault} in its *.safetensors: {key}")
    return model


def _stored_dtype(name: str, folder: Path) -> torch.dtype:
    """Return the dtype of the weights in the files; of several, one that holds them all exactly."""
    found = set()
    for file in _weight_files(name, folder):
        with _reading(name, file.name), safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    if not found <= set(_STORED_DTYPES):
        raise ValueError(f"model {name!r}: weights in {', '.join(sorted(found))}; allowed: {', '.join(_STORED_DTYPES)}")
    return reduce(torch.promote_types, (_STORED_DTYPES[dtype] for dtype in found))


def _skip_layers(model: PreTrainedModel, skipped: set[int]) -> None:
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in skipped]
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def _drop_padding(model: PreTrainedModel, tokens: int) -> None:
    """Leave out the rows of embeddings and LM head from id `tokens` on; tied ones stay tied."""
    embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
    model.model.embed_tokens = nn.Embedding.from_pretrained(embeddings[:tokens])
    tied = head is embeddings
    model.lm_head.weight = model.model.embed_tokens.weight if tied else nn.Parameter(head[:tokens])
    model.lm_head.out_features = model.config.vocab_size = tokens


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of model `name`."""
    folder = local_folder(name)
    with _reading(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_spec_models(
    target_model: str = "smollm2-135m",
    draft_model: str = "smollm2-135m",
    *,
    dtype: torch.dtype = torch.float32,
    device: Placement = "cpu",
    backend: str | None = None,
    target_sc_overrides: dict[str, Any] | str | None = None,
    draft_sc_overrides: dict[str, Any] | str | None = None,
    draft_skip_layers: tuple[int, ...] = (),
    keep_float_weights: bool = False,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (target, draft, tokenizer): two separately loaded, separately patched instances (`load_model`).

    Raises ValueError, before any weights are loaded, if their vocabularies differ.
    """
    check_vocabularies(target_model, draft_model)
    load = partial(load_model, dtype=dtype, device=device, backend=backend, keep_float_weights=keep_float_weights)
    target = load(target_model, sc_overrides=target_sc_overrides)
    draft = load(draft_model, sc_overrides=draft_sc_overrides, skip_layers=draft_skip_layers)
    return target, draft, load_tokenizer(target_model)


def context_limit(name: str) -> int:
    """Return how many positions model `name` has."""
    positions: int = model_config(name).max_position_embeddings
    return positions


def check_vocabularies(target_model: str, draft_model: str) -> None:
    """Raise ValueError if the two models' tokens do not mean the same; logits that are no token's may differ."""
    if target_model == draft_model:
        return
    sizes = [vocabulary_size(name) for name in (target_model, draft_model)]
    tokens = [_vocabulary(name) for name in (target_model, draft_model)]
    if sizes[0] != sizes[1] or tokens[0] != tokens[1]:
        raise ValueError(
            f"draft {draft_model!r} and target {target_model!r}: their vocabularies differ ({sizes[1]} and {sizes[0]} "
            f"tokens with a logit, {len(tokens[1])} and {len(tokens[0])} tokens); speculative decoding needs the same "
            f"tokens"
        )
