"""The rooms import only what docs/architecture.md allows; planning a grid loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scspec"

#: (files, what none of them may import)
RULES = [
    ("sc/*.py", {"scspec.decoding", "scspec.config", "scspec.cells", "transformers", "altair"}),
    ("invariant/*.py", {"scspec.sc", "scspec.decoding", "scspec.config", "transformers", "altair"}),
    ("decoding/*.py", {"scspec.sc", "scspec.invariant", "scspec.config", "scspec.cells", "transformers", "altair"}),
    ("aliases.py", {"torch", "transformers"}),
    ("config.py", {"torch", "transformers"}),
    ("families.py", {"torch", "transformers"}),
    ("cells.py", {"torch", "transformers"}),
    ("jobs.py", {"torch", "transformers", "scspec.cells"}),
    ("prompt*.py", {"torch", "transformers"}),
    ("estimate.py", {"torch", "transformers", "scspec.replay", "scspec.quality"}),
    ("inventory.py", {"torch", "transformers"}),
    ("cli/*.py", {"torch", "transformers", "numba"}),
    ("stats/*.py", {"torch", "transformers", "altair", "scspec.quality"}),
    ("results.py", {"torch", "transformers", "altair"}),
    ("charts/*.py", {"torch", "transformers", "scspec.report", "scspec.results"}),
    ("report/*.py", {"torch", "transformers", "scspec.decoding", "scspec.sc", "scspec.cells"}),
    ("checkpoint.py", {"torch", "transformers", "scspec.decoding", "scspec.cells"}),
]
ONLY_IN = {
    "altair": {"report/render.py", *(f"charts/{path.name}" for path in (PACKAGE / "charts").glob("*.py"))},
    "transformers": {"conversion.py", "models.py", "patching.py"},
    "submitit": set(),
    "typer": {"cli/__init__.py", "cli/jobs.py", "cli/models.py"},
    "triton": {
        *("invariant/triton.py", "sc/triton.py", "sc/triton_attention.py"),
        *("sc/triton_encoding.py", "sc/triton_kv.py"),
    },
    "cuda": {"sc/cuda.py"},
}


def imports(path: Path) -> set[str]:
    """Return the modules a file imports, anywhere in it; `from .x` counts as its own package's module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(("scspec", *path.parent.relative_to(PACKAGE).parts)) + "." if node.level else ""
            found.add(prefix + (node.module or ""))
            found |= {f"{prefix}{node.module}.{alias.name}" for alias in node.names if node.module}
    return found


def reaches(found: set[str], module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in found)


@pytest.mark.parametrize(("files", "forbidden"), RULES, ids=[rule[0] for rule in RULES])
def test_rooms_import_only_what_they_may(files, forbidden):
    paths = sorted(PACKAGE.glob(files))
    assert paths
    for path in paths:
        wrong = [module for module in forbidden if reaches(imports(path), module)]
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


@pytest.mark.parametrize("module", ONLY_IN)
def test_libraries_stay_in_their_rooms(module):
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if reaches(imports(path), module)}
    assert users <= ONLY_IN[module]


PLANNING = ["scspec.estimate, scspec.inventory, scspec.doctor, scspec.cli", "scspec.report, scspec.compare"]


@pytest.mark.parametrize("modules", PLANNING)
def test_planning_and_reporting_load_neither_torch_nor_numba(modules):
    code = f"import {modules}, sys; print(sorted({{'torch', 'numba'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
