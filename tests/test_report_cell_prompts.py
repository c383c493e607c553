"""The page of a cell shows a prompt as its file has it, and none of another file."""

import pytest
from fake_cells import fake_keys, fake_rows
from report_pages import page_of, prompt_file

from scspec.prompts import load_prompts
from scspec.report import cell as cell_module

GONE = "the prompt file is not here, or has changed"


def test_the_prompts_own_text(tmp_path):
    rows = fake_rows(fake_keys(), prompts=1)
    page = page_of(tmp_path, rows, prompts=prompt_file(tmp_path, "Why <i>does</i>\\u202e bread\\n rise?" + "y" * 400))
    assert "Prompt: <bdi>Why &lt;i&gt;does&lt;/i&gt;[U+202E] bread\n rise?" in page.source
    assert "yyyy…" in page.text
    assert page.text.count("y") < 300 + 100
    assert "another turn" not in page.text
    assert GONE not in page.text


@pytest.mark.parametrize("what", ["gone", "changed", "no name"])
def test_another_prompt_file_is_not_shown(tmp_path, what):
    prompts = prompt_file(tmp_path, f"a text, {what}")
    if what == "gone":
        (tmp_path / "prompts.jsonl").unlink()
    elif what == "changed":
        prompt_file(tmp_path, "another text")
    else:
        prompts["file"] = "no\0name"
    page = page_of(tmp_path, fake_rows(fake_keys(), prompts=1), prompts=prompts)
    assert GONE in page.text
    assert "a text" not in page.text
    assert "another text" not in page.text


def test_a_prompt_file_is_read_once(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(cell_module, "load_prompts", lambda file: reads.append(file) or load_prompts(file))
    prompts = prompt_file(tmp_path, "read once")
    for _ in range(3):
        assert "read once" in page_of(tmp_path, fake_rows(fake_keys(), prompts=1), prompts=prompts).text
    assert len(reads) == 1
