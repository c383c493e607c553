"""Which models are on this machine, and whether their files are those that they should be. It fetches nothing.

A file's hash is held against what is known of it: the manifest that `scspec models fetch` wrote, the hashes that were
kept when an alias was converted, and of the hub's cache the name under which it keeps the file. Imports no torch.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scspec.aliases import ALIASES, CONVERTED_HASHES, folder_here
from scspec.jobs import manifest_name
from scspec.provenance import sha256_of


@dataclass(frozen=True)
class ModelHere:
    """A model by a name that is known: an alias, or a repository in the hub's cache. `folder` is None if not here."""

    name: str
    folder: Path | None
    size_bytes: int
    note: str


@dataclass(frozen=True)
class Verdict:
    """What became of one file: `fault` is empty if its hash is the one that `against` says."""

    file: Path
    against: str
    fault: str


def models_here() -> list[ModelHere]:
    """Return every alias, and every model in the hub's cache that has safetensors, by name."""
    aliases = [_here(name, folder_here(name), source.note) for name, source in ALIASES.items()]
    return [*aliases, *(_here(name, folder_here(name), "Hugging Face") for name in _hub_models())]


def _here(name: str, folder: Path | None, note: str) -> ModelHere:
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if folder else 0
    return ModelHere(name, folder, size, note)


def _hub_models() -> list[str]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(
        repo.repo_id
        for repo in found
        if repo.repo_type == "model"
        and any(file.file_name.endswith(".safetensors") for revision in repo.revisions for file in revision.files)
    )


def verify(name: str, manifests: Path) -> Iterator[Verdict]:
    """Yield a verdict per file of model `name`, as soon as it is read.

    Where nothing says what the files should be, that is the one fault. Raises FileNotFoundError if the model is not
    here, and ValueError for a manifest that cannot be read.
    """
    folder = folder_here(name)
    if folder is None:
        raise FileNotFoundError(f"model {name!r}: not on this machine; fetch it: scspec models fetch {name}")
    manifest = manifests / f"{manifest_name(name)}.json"
    if name in ALIASES:
        yield from _verify_alias(name, folder)
    elif manifest.exists():
        yield from _against(folder, _hashes(manifest), str(manifest))
    else:
        yield from _verify_in_cache(name, folder, manifest)


def verifiable(manifests: Path) -> list[str]:
    """Return the names of the models that are here and can be verified: all of `models_here`, and local folders that
    have a manifest. A manifest of a model that has gone counts for nothing.
    """
    here = [model.name for model in models_here() if model.folder]
    named = [_read(path).get("name") for path in sorted(manifests.glob("*.json"))]
    return [*here, *(name for name in named if name and name not in here and folder_here(name))]


def _verify_alias(name: str, folder: Path) -> Iterator[Verdict]:
    pinned, found = ALIASES[name].sha256, _read(folder / "manifest.json").get("sha256")
    fault = "" if found == pinned else f"was made from a file of SHA-256 {found}, the pin is {pinned}"
    yield Verdict(folder / "manifest.json", "the pin of the alias", fault)
    kept = folder / CONVERTED_HASHES
    if kept.exists():
        yield from _against(folder, _read(kept), "its conversion")
    else:
        again = f"delete {folder} and fetch it again: scspec models fetch {name}"
        yield Verdict(kept, "its conversion", f"is missing, the model was converted before hashes were kept; {again}")


def _verify_in_cache(name: str, folder: Path, manifest: Path) -> Iterator[Verdict]:
    """Files of the hub's cache are links to blobs, named by their SHA-256 or, where small, by git's hash of them."""
    links = [file for file in sorted(folder.iterdir()) if file.is_symlink()]
    if not links:
        write = f"write it while they are good: scspec models fetch {name} --manifest {manifest}"
        yield Verdict(manifest, "", f"is missing, and nothing else says what the files of {name} should be; {write}")
    for link in links:
        blob = link.resolve()
        if not blob.exists():
            fault = "is missing"
        else:
            found = sha256_of(blob) if len(blob.name) == 64 else _git_hash(blob)
            fault = "" if found == blob.name else f"has hash {found}, expected {blob.name}"
        yield Verdict(link, "the hub's cache", fault)


def _git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _against(folder: Path, hashes: dict[str, str], against: str) -> Iterator[Verdict]:
    for file, expected in hashes.items():
        path = folder / file
        found = sha256_of(path) if path.exists() else None
        fault = "" if found == expected else f"has SHA-256 {found}, expected {expected}" if found else "is missing"
        yield Verdict(path, against, fault)


def _hashes(manifest: Path) -> dict[str, str]:
    hashes = _read(manifest).get("sha256")
    if not isinstance(hashes, dict):
        raise ValueError(f"{manifest}: no manifest of a model's files; needed: what scspec models fetch writes")
    return hashes


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return found
