"""The cache of compiled code: no code of other sources comes out of it, and what comes out of it runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scspec import jit, provenance

TESTS = Path(__file__).parent
CALLEE = "from standin.jit import compiled\n\nBY = 10\n\n@compiled\ndef scaled(x):\n    return BY * x\n"
CALLER = "from standin.callee import BY, scaled\nfrom standin.jit import compiled\n\n"
CALLER += "@compiled\ndef both(x):\n    return scaled(x), BY\n\n"
CALLER += "print(*both(3), sum(both.stats.cache_hits.values()))\n"
# The LM head in SC, because packing a float one would start the threads.
FORWARD = """
import torch
from scspec.patching import patch_model
from tiny import tiny_model

print(float(patch_model(tiny_model(), {'sc_lm_head': True})(input_ids=torch.arange(3)[None]).logits.sum()))
"""


def run(*arguments: str, cache: Path, path: Path) -> str:
    """Return what a Python process prints whose compiled code is kept in `cache`."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    """A package with the real `jit` and a compiled function that calls one of another file."""
    package = tmp_path / "standin"
    package.mkdir()
    (package / "__init__.py").touch()
    for module in (jit, provenance):
        shutil.copy(module.__file__, package)
    (package / "callee.py").write_text(CALLEE)
    (package / "caller.py").write_text(CALLER)
    return package


def test_an_edit_of_another_file_is_compiled_in(standin: Path, tmp_path: Path) -> None:
    """numba's own cache would answer 30 10 to the end: the caller's file has not changed."""

    def answer() -> str:
        return run("-m", "standin.caller", cache=tmp_path / "cache", path=tmp_path)

    assert answer() == "30 10 0"
    assert answer() == "30 10 1"  # from the cache
    (standin / "callee.py").write_text(CALLEE.replace("10", "20"))
    assert answer() == "60 20 0"
    (standin / "callee.py").write_text(CALLEE)
    assert answer() == "30 10 1"


def test_a_file_that_comes_or_moves_is_another_state_of_the_sources(standin: Path, tmp_path: Path) -> None:
    folders = set()
    for change in (lambda: None, (standin / "new.py").touch, lambda: (standin / "new.py").rename(standin / "moved.py")):
        change()
        folders.add(run("-c", "from standin import jit; print(jit._cache_folder())", cache=tmp_path, path=tmp_path))
    assert len(folders) == 3


def test_nothing_is_cached_where_nothing_can_be_written(standin: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        assert run("-m", "standin.caller", cache=tmp_path / "file", path=tmp_path) == "30 10 0"
    assert not list(standin.rglob("*.nbi"))


def test_a_package_that_cannot_be_written_caches_with_the_user(standin: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (standin / "__pycache__").touch()  # a file, because whoever is root may write in any folder
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-m", "standin.caller"]
    said = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in "ab"]
    assert said == ["30 10 0\n", "30 10 1\n"]
    assert list((tmp_path / "user" / "scspec").glob("kernels-*"))


def test_code_from_the_cache_finds_numbas_threads_started(tmp_path: Path) -> None:
    """A layer compiled while its parallel callees came from the cache does not start them when it comes from there."""
    path = f"{TESTS}{os.pathsep}{TESTS.parent}"
    whole = run("-c", FORWARD, cache=tmp_path, path=path)
    layer = list(tmp_path.rglob("fused_cpu._decoder_layer-*"))
    assert layer
    for file in layer:
        file.unlink()
    assert [run("-c", FORWARD, cache=tmp_path, path=path) for _ in ("compiled", "from the cache")] == [whole, whole]
