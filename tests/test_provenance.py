"""Provenance: what is not installed is said, not fatal."""

import re
import tomllib
from pathlib import Path

from scspec import provenance


def test_a_package_that_is_not_here_has_no_version(monkeypatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    found = provenance.versions()
    assert list(found) == ["python", "numpy", "no-such-package"]
    assert found["numpy"]
    assert found["no-such-package"] is None


def test_what_compiles_kernels_is_recorded() -> None:
    """The requirements of Linux alone are those of a GPU."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    of_linux = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"] if "platform_system" in line}
    assert of_linux
    assert of_linux <= set(provenance.PACKAGES)
