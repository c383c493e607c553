"""The page of a cell shows a prompt as its file has it, and none of another file."""

import json

import pytest
from fake_cells import fake_keys, fake_rows
from report_pages import file_of, page_of, prompt_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

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


def page_of_row(folder, **row):
    prompts = file_of([json.dumps({"id": "p00", **row})], folder)
    return page_of(folder, fake_rows(fake_keys(), prompts=1), prompts=prompts)


@pytest.mark.parametrize(
    ("reference", "shown"), [("Forty <b>two</b>", "Forty <b>two</b>"), (["42", "", "6 * 7"], "42 / 6 * 7")]
)
def test_reference_answers_are_beside_the_prompt(tmp_path, reference, shown):
    page = page_of_row(tmp_path, prompt="How many?", reference=reference)
    assert f"Prompt: How many? Reference: {shown} " in page.text
    assert "<b>two" not in page.source


@pytest.mark.parametrize("reference", [{}, {"reference": ["", " "]}])
def test_without_an_answer_there_is_no_reference(tmp_path, reference):
    assert "Reference" not in page_of_row(tmp_path, prompt="How many?", **reference).text


def test_what_was_said_before_is_counted(tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    page = page_of_row(tmp_path, system="Be brief.", messages=[*said, {"role": "user", "content": "How many?"}])
    assert "Prompt (earlier messages: 3): How many?" in page.text
    assert "Prompt: How many?" in page_of_row(tmp_path, prompt="How many?").text


@pytest.mark.parametrize(("readable", "shown"), [(True, "How <s> many?"), (False, "1 0 2")])
def test_token_ids_are_read_where_the_tokenizer_is_here(tmp_path, monkeypatch, readable, shown):
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "How": 1, "many?": 2}, unk_token="<s>"))
    tokenizer.add_special_tokens(["<s>"])
    monkeypatch.setattr(cell_module, "tokenizer_here", lambda model: tokenizer if readable else None)
    assert f"Prompt: {shown} " in page_of_row(tmp_path, prompt_token_ids=[1, 0, 2]).text


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
