"""`compiled`: numba's compiler with a cache on disk that never answers with machine code of other sources.

numba keeps a function's machine code for as long as the file that defines it stays the same. But the code of the
functions it calls, and constants of other files, are part of that machine code: after an edit there it would be stale,
and a process that starts beside the one that renews it could read an old file under a new index. So each state of the
package's sources has a folder of its own.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import numba

from .provenance import sources_sha256

_PACKAGE = Path(__file__).resolve().parent
_CONFIG: Any = numba.config  # makes its attributes when it is imported: no checker sees them

Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def compiled(function: Function, *, parallel: bool = False) -> Function: ...


@overload
def compiled(*, parallel: bool = False) -> Callable[[Function], Function]: ...


def compiled(function: Callable[..., Any] | None = None, *, parallel: bool = False) -> Callable[..., Any]:
    """Return `function` compiled on its first call, without the GIL; a decorator, with or without arguments.

    A compiled function that is not parallel itself but calls a parallel one, and comes from the cache, does not start
    numba's threads: its caller does, by `numba.get_num_threads()`.
    """
    if function is None:
        return functools.partial(compiled, parallel=parallel)
    folder = _cache_folder()
    before = _CONFIG.CACHE_DIR
    _CONFIG.CACHE_DIR = folder  # numba reads it when it decorates
    try:
        machine_code: Callable[..., Any] = numba.njit(function, cache=bool(folder), nogil=True, parallel=parallel)
    finally:
        _CONFIG.CACHE_DIR = before
    return machine_code


@functools.cache
def _cache_folder() -> str:
    """Return the folder of the machine code of these sources: in $NUMBA_CACHE_DIR if set, else beside this file.

    Where that cannot be written, it lies in the user's cache folder; empty, for no cache, if not even there, because
    numba's own choice of a folder forgets the hash.
    """
    sources = sources_sha256()
    users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scspec"
    for place in [Path(_CONFIG.CACHE_DIR)] if _CONFIG.CACHE_DIR else [_PACKAGE / "__pycache__", users]:
        folder = place / f"kernels-{sources[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return str(folder)
    return ""
