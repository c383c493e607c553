"""What the documentation says of files, columns and settings is so. Its examples: test_docs_examples.py."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import config_reference
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from documents import CURRENT, DOCUMENTS, REPOSITORY, Document, document
from fake_cells import fake_keys
from report_pages import report_of, write_measured

from scspec.config import SCHEMA_PATH
from scspec.replay import PREDICTIONS_KEYS, PREDICTIONS_SCHEMA, TRAJECTORY_KEYS, TRAJECTORY_SCHEMA
from scspec.results import METADATA_KEYS, QUALITY_KEYS, QUALITY_SCHEMA, SCHEMA

RESULTS = document("docs/results.md")
README_LINES = 200
#: What a path in code begins with that is to be in a clone; results/ and reports/ come of runs.
ROOTS = ("docs", "scspec", "tests", "workflow", "benchmarks", "training", "prompts", "profiles", "slurm", ".ci")
TYPES = {"double": "float64", "float": "float32", "large_string": "string"}


def each(documents: list[Document]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("doc", documents, ids=lambda doc: str(doc.path.relative_to(REPOSITORY)))


def type_name(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list<{type_name(kind.value_type)}>"
    return TYPES.get(str(kind), str(kind))


def documented_columns(heading: str) -> list[tuple[str, str]]:
    """(name, type) of each column in the table below a heading of docs/results.md."""
    return [(name, kind) for names, kind, _ in RESULTS.rows(heading) for name in re.findall(r"`(\w+)`", names)]


SCHEMAS = {"A cell": SCHEMA, "A trajectory": TRAJECTORY_SCHEMA, "Predictions": PREDICTIONS_SCHEMA}
SCHEMAS["Quality"] = QUALITY_SCHEMA


@pytest.mark.parametrize("heading", SCHEMAS)
def test_columns_are_documented_in_their_order_with_their_types(heading):
    """A column that is missing, of another type, or null where the page does not say so."""
    found = [(field.name, type_name(field.type) + ", null" * field.nullable) for field in SCHEMAS[heading]]
    assert documented_columns(heading) == found


def test_the_reports_table_is_documented(tmp_path):
    plan = write_measured(tmp_path, (fake_keys(), 0.7, 3.0))
    report = report_of(tmp_path, plan)
    written = pq.read_schema(report.folder / "index.parquet")
    assert documented_columns("The report's table") == [(field.name, type_name(field.type)) for field in written]


def test_metadata_keys_are_documented():
    keys = {key for names, _ in RESULTS.rows("Its metadata") for key in re.findall(r"`(\w+)`", names)}
    assert keys == METADATA_KEYS


@pytest.mark.parametrize(
    ("heading", "keys"),
    [("A trajectory", TRAJECTORY_KEYS), ("Predictions", PREDICTIONS_KEYS), ("Quality", QUALITY_KEYS)],
)
def test_what_other_files_say_beside_a_cells_metadata_is_documented(heading, keys):
    (line,) = re.findall(rf"\n## {heading}\n.*?\nMetadata: (.*?)\.\s", RESULTS.source, re.DOTALL)
    assert re.findall(r"`(\w+)`", line)[0] == "cell"  # without it
    assert set(re.findall(r"`(\w+)`", line)[1:]) == keys - METADATA_KEYS


def test_the_reference_of_settings_is_what_is_written_from_the_schema():
    assert config_reference.OUTPUT.read_text(encoding="utf-8") == config_reference.reference()


def mappings(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every node of the schema with named keys."""
    if "properties" in node:
        yield node
    for key in ("additionalProperties", "items"):
        if isinstance(node.get(key), dict):
            yield from mappings(node[key])
    for sub in (*node.get("properties", {}).values(), *node.get("anyOf", ())):
        yield from mappings(sub)


@cache
def schema() -> dict[str, Any]:
    return yaml.safe_load(SCHEMA_PATH.read_text())


def test_each_setting_is_in_the_reference_once():
    """The sections that the script walks are all there are: none is left out with a new level of nesting."""
    keys = [name for node in mappings(schema()) for name in node["properties"]]
    rows = re.findall(r"^\| `(\w+)` \|", document("docs/config.md").source, re.MULTILINE)
    assert set(rows) == set(keys) - {"sc_stoc_len", "ratio"}  # these are said in the row of what holds them


def settings_of(doc: Document) -> Iterator[dict[str, Any]]:
    """Yield the mappings that a document says: YAML blocks, and code such as `device: cuda`."""
    for text in [*doc.blocks("yaml"), *(code for code in doc.code if re.match(r"[\w-]+: ", code))]:
        yield yaml.safe_load(text)


def fits(mapping: dict[str, Any]) -> bool:
    """Whether it is settings of `config.yaml`, at whatever level, with allowed values."""
    placed = (node for node in mappings(schema()) if set(mapping) <= set(node["properties"]))
    return any(
        all(jsonschema.Draft202012Validator(node["properties"][key]).is_valid(mapping[key]) for key in mapping)
        for node in placed
    )


@cache
def snakemakes_options() -> str:
    command = [sys.executable, "-m", "snakemake", "--help"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


@each(CURRENT)
def test_settings_that_are_mentioned_exist(doc):
    """Those of `config.yaml` by its schema; those of a profile are Snakemake's options."""
    for mapping in settings_of(doc):
        in_profile = all(f"--{key}" in snakemakes_options() for key in mapping)
        assert fits(mapping) or in_profile, f"{doc.path.name}: {mapping}"


def test_settings_given_on_the_command_line_exist():
    given = [key for doc in CURRENT for key in re.findall(r"--config ((?:\w+=\S+ ?)+)", doc.source)]
    keys = {key for text in given for key in re.findall(r"(\w+)=", text)}
    assert {"gamma", "device", "dtype"} <= keys
    assert keys - {"KEY"} <= set(schema()["properties"])


@each(DOCUMENTS)
def test_links_lead_somewhere(doc):
    for link in doc.links:
        name, _, anchor = link.partition("#")
        path = doc.path.parent / name if name else doc.path
        assert path.exists(), f"{doc.path.name}: {link}"
        assert not anchor or anchor in Document(path).anchors, f"{doc.path.name}: {link}"


@each(CURRENT)
def test_files_that_are_named_exist(doc):
    for code in doc.code:
        is_path = code.split("/")[0] in ROOTS and re.fullmatch(r"[\w./-]+", code)
        if is_path and "NAME" not in code:
            assert (REPOSITORY / code).exists(), f"{doc.path.name}: {code}"


def test_readme_is_short_and_leads_to_every_page():
    readme = document("README.md")
    assert len(readme.source.splitlines()) < README_LINES
    linked = {(REPOSITORY / link.split("#")[0]).resolve() for link in readme.links}
    assert {doc.path for doc in DOCUMENTS} - {readme.path} <= linked


def test_the_citation_has_what_the_format_needs_and_the_packages_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert f'version = "{citation["version"]}"' in (REPOSITORY / "pyproject.toml").read_text()
    assert f"## [{citation['version']}]" in document("CHANGELOG.md").source


def test_lint_has_nothing_to_say_but_what_contributing_defends():
    command = [sys.executable, "-m", "snakemake", "--lint"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stderr
    titles = set(re.findall(r"^    \* (.+?):$", said, re.MULTILINE))
    globals_read = {
        f"Shell command directly uses variable {name} from outside of the rule"
        for name in ("PYTHON", "BATCH", "COUNTS")
    }
    assert titles == {"Specify a conda environment or container for each rule.", *globals_read}


def test_the_catalog_is_told_what_it_reads():
    usage = yaml.safe_load(Path(REPOSITORY / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(usage["mandatory-flags"]) == {"desc", "flags"}
    assert not any(usage["software-stack-deployment"].values())  # as long as no rule names an environment
