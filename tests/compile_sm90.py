"""Compile kernels for sm_90 without a GPU: the functions that launch them run, and their launches only compile.

    python tests/compile_sm90.py MODULE

prints, as JSON, how many binaries each entry of `MODULE.launches()` (name -> function) needs: {name: {kernel: count}}.
So what is compiled is what ships: the same dtypes, constants, options and specialisations.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


class CompilingDriver:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_launches(launches: dict) -> dict[str, dict[str, int]]:
    """Return how many binaries of each kernel each of the functions `launches` asks for. Nothing is launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    hashes = set()
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        hashes.add((kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **options).hash))

    driver.set_active(CompilingDriver())
    JITFunction.run = compile_only
    counts = {}
    for name, launch in launches.items():
        hashes.clear()
        launch()
        counts[name] = defaultdict(int)
        for kernel, _ in hashes:
            counts[name][kernel] += 1
    return counts


def compiled(module: str) -> dict[str, dict[str, int]]:
    """Return what compile_launches gives for a test module's launches(), from a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, module]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


if __name__ == "__main__":
    print(json.dumps(compile_launches(importlib.import_module(sys.argv[1]).launches())))
