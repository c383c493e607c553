"""A stand-in for nvidia-smi, for tests of what is done with the GPUs of a machine that may have none."""

import os
from pathlib import Path

UUIDS = [f"GPU-{letter * 8}-0000-1111-2222-333344445555" for letter in "abcdefgh"]


def fake_nvidia_smi(folder: Path, gpus: int) -> dict[str, str]:
    """Return the changes of the environment in which nvidia-smi lists so many GPUs, and locks lie in `folder` too."""
    listed = "".join(f"{number}, {uuid}\n" for number, uuid in enumerate(UUIDS[:gpus]))
    program = f"cat <<END\n{listed}END\n" if gpus else "echo No devices were found\nexit 6\n"
    for name in ("bin", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{program}")
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(folder / "tmp")}
