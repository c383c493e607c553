"""Prompt files are read strictly, encode to flat token ids, and hash to values that do not move.

What a row may say: `test_prompt_rows.py`.
"""

import gzip
import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scspec import prompts
from scspec.prompts import Prompt, encode_turn, load_prompts, token_ids_sha256, turn_ids
from scspec.provenance import sha256_of

PROMPT_DIR = Path(__file__).parents[1] / "prompts"
CATEGORIES = (
    "short_qa",
    "maths",
    "code",
    "summarising",
    "writing",
    "extraction",
    "translation",
    "reasoning",
)
GOOD = b'{"id": "first", "prompt": "Hello there."}\n'


def write(tmp_path: Path, content: bytes, name: str = "mine.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


# ---- the shipped files


def test_bench48_has_six_prompts_in_each_of_eight_categories():
    bench = load_prompts(PROMPT_DIR / "bench48.jsonl")
    assert Counter(prompt.category for prompt in bench) == dict.fromkeys(CATEGORIES, 6)
    expected_ids = {f"{category}-{number}" for category in CATEGORIES for number in range(1, 7)}
    assert {prompt.prompt_id for prompt in bench} == expected_ids
    assert len({prompt.turns[0] for prompt in bench}) == 48


def test_bench48_turns_have_10_to_120_words_and_two_prompts_have_two_turns():
    bench = load_prompts(PROMPT_DIR / "bench48.jsonl")
    lengths = {(p.prompt_id, turn): len(turn.split()) for p in bench for turn in p.turns}
    assert {key: words for key, words in lengths.items() if not 10 <= words <= 120} == {}
    assert {p.prompt_id: len(p.turns) for p in bench if len(p.turns) > 1} == {
        "writing-1": 2,
        "reasoning-6": 2,
    }


def test_smoke_has_four_short_prompts_of_its_own():
    smoke = load_prompts(PROMPT_DIR / "smoke.jsonl")
    bench = load_prompts(PROMPT_DIR / "bench48.jsonl")
    assert len(smoke) == 4
    assert len({prompt.category for prompt in smoke} & set(CATEGORIES)) == 4
    assert max(len(turn.split()) for prompt in smoke for turn in prompt.turns) <= 40
    assert not {prompt.prompt_id for prompt in smoke} & {prompt.prompt_id for prompt in bench}


# ---- files


def test_the_examples_of_the_formats_documentation_are_understood(tmp_path):
    examples = re.findall(r"```json\n(.*?)```", (PROMPT_DIR / "README.md").read_text(), re.DOTALL)
    found = load_prompts(write(tmp_path, "".join(examples).encode()))
    assert [prompt.prompt_id for prompt in found] == ["maths-1", "1", "2", "3"]


def test_only_newlines_end_a_row(tmp_path):
    """U+2028 may stand unescaped in JSON; Windows line ends are white space to JSON."""
    path = write(tmp_path, '{"id": "a", "prompt": "x\u2028y"}\r\n{"id": "b", "prompt": "z"}\r\n'.encode())
    assert [prompt.turns for prompt in load_prompts(str(path))] == [("x\u2028y",), ("z",)]


TEXT = 'First line\n\n  spaces stay \r\n \t\n{"id": \u2028 4}'.encode()


@pytest.mark.parametrize(("name", "pack"), [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("A.TXT.GZ", gzip.compress)])
def test_each_line_of_a_text_file_is_a_prompt_unless_it_is_blank(tmp_path, name, pack):
    assert load_prompts(write(tmp_path, pack(TEXT), name)) == [
        Prompt("1", "uncategorised", ("First line",)),
        Prompt("3", "uncategorised", ("  spaces stay ",)),
        Prompt("5", "uncategorised", ('{"id": \u2028 4}',)),
    ]


def test_gzipped_rows_are_rows(tmp_path):
    path = write(tmp_path, gzip.compress(GOOD) + gzip.compress(b'{"id": "second", "prompt": "Hi"}'), "rows.jsonl.gz")
    assert [prompt.prompt_id for prompt in load_prompts(path)] == ["first", "second"]
    path.write_bytes(gzip.compress(GOOD + b"{}"))
    with pytest.raises(ValueError, match=f"^{path}, line 2: missing 'question_id'"):
        load_prompts(path)


WHOLE = gzip.compress(GOOD, mtime=0)
NOT_WHOLE = {
    "not gzip": GOOD,
    "more behind": WHOLE + b"more",
    "checksum": WHOLE[:-8] + bytes(4) + WHOLE[-4:],
    "no such block": WHOLE[:10] + b"\xff" * 20,
    **{f"torn at {end}": WHOLE[:end] for end in range(1, len(WHOLE))},
}


@pytest.mark.parametrize("content", NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_a_file_that_is_not_whole_gzip_is_refused_in_one_line(tmp_path, content):
    path = write(tmp_path, content, "mine.jsonl.gz")
    with pytest.raises(ValueError, match=rf"^{path}: not a whole gzip file \(.+\); allowed: gzip, as the name says$"):
        load_prompts(path)


def test_an_integer_id_and_the_same_digits_as_text_are_one_id(tmp_path):
    path = write(tmp_path, b'{"id": 7, "prompt": "a"}\n{"id": "7", "prompt": "b"}\n')
    with pytest.raises(ValueError, match="line 2: id '7' is already used in line 1"):
        load_prompts(path)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.txt"])
@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n", "\u00a0\n\u2003".encode()])
def test_an_empty_file_is_refused(tmp_path, content, name):
    path = write(tmp_path, content, name)
    with pytest.raises(ValueError, match="line 1: the file is empty; allowed: ") as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "wrong"),
    [
        ("utf-8-sig", "byte order mark"),
        ("utf-16", "wrong encoding, byte 0xff"),
        ("utf-16-le", "wrong encoding, byte 0x00"),
    ],
)
@pytest.mark.parametrize("name", ["mine.jsonl", "mine.txt"])
def test_a_file_in_another_encoding_is_refused(tmp_path, encoding, wrong, name):
    path = write(tmp_path, GOOD.decode().encode(encoding), name)
    with pytest.raises(ValueError, match=wrong) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}, line 1: ")


@pytest.mark.parametrize(("name", "reason"), [("nowhere.jsonl", "No such file or directory"), (".", "Is a directory")])
def test_what_cannot_be_read_is_named(tmp_path, name, reason):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError) as caught:
        load_prompts(path)
    assert str(caught.value) == f"{path}: cannot be read ({reason}); allowed: the path of a prompt file"


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(FileNotFoundError, match=r"mine\.jsonl: cannot be read \(Permission denied\); allowed: "):
        load_prompts(write(tmp_path, GOOD))


# ---- token ids


class CharTokenizer:
    """One id per character, its code point. `tokenizer(text)` puts 1 in front, like a BOS token."""

    chat_template: str | None = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


class ChatTokenizer(CharTokenizer):
    """Renders as a Llama-3 template does: the date first, today's ("TODAY") unless `date_string` is given."""

    chat_template = "{{ ... }}"

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        date_string: str = "TODAY",
    ) -> list[int] | dict[str, list[int]] | str:
        text = f"[{date_string}]" + "".join(f"<{m['role']}>{m['content']}" for m in conversation)
        text += "<assistant>" if add_generation_prompt else ""
        ids = [ord(char) for char in text]
        return ({"input_ids": ids} if return_dict else ids) if tokenize else text


class Returns(ChatTokenizer):
    """A chat tokenizer that returns a given value, whatever it is asked."""

    def __init__(self, value: object) -> None:
        self.value = value

    def apply_chat_template(self, *_: object, **__: object) -> object:
        return self.value


HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_encode_turn_renders_history_then_user_then_the_assistant_header():
    ids = encode_turn(ChatTokenizer(), HISTORY, "Go on")
    assert text_of(ids) == "[26 Jul 2024]<user>Hi<assistant>Yes?<user>Go on<assistant>"
    assert type(ids) is list
    assert {type(token_id) for token_id in ids} == {int}


def test_encode_turn_without_history_and_with_another_date():
    assert text_of(encode_turn(ChatTokenizer(), [], "Hi", date_string="1 Jan")) == "[1 Jan]<user>Hi<assistant>"


def test_encode_turn_leaves_the_history_alone():
    history = [dict(message) for message in HISTORY]
    encode_turn(ChatTokenizer(), history, "Go on")
    encode_turn(CharTokenizer(), history, "Go on")
    assert history == HISTORY


@pytest.mark.parametrize("template", [None, ""])
def test_encode_turn_without_a_chat_template_joins_the_texts_by_blank_lines(template):
    tokenizer = CharTokenizer()
    tokenizer.chat_template = template
    assert text_of(encode_turn(tokenizer, HISTORY, "Go on")) == "\x01Hi\n\nYes?\n\nGo on"
    assert encode_turn(tokenizer, [], "Go") == [1, ord("G"), ord("o")]


def test_a_prompts_turn_comes_after_its_history_and_the_replies():
    prompt = Prompt("a", "maths", ("One?", "Two?"), (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?")))
    before = "[26 Jul 2024]<system>Be brief.<user>Hi<assistant>Yes?<user>One?<assistant>"
    assert text_of(turn_ids(ChatTokenizer(), prompt)) == before
    assert text_of(turn_ids(ChatTokenizer(), prompt, ["1."])) == before + "1.<user>Two?<assistant>"
    assert text_of(turn_ids(CharTokenizer(), prompt, ["1."])) == "\x01Be brief.\n\nHi\n\nYes?\n\nOne?\n\n1.\n\nTwo?"


def test_token_ids_are_the_turn_as_they_are():
    assert turn_ids(None, Prompt("a", "maths", ((5, 0, 5),))) == [5, 0, 5]


@pytest.mark.parametrize("value", [[[1, 2]], {"input_ids": [1, 2]}, "text", ["a", "b"]])
def test_encode_turn_refuses_anything_but_a_flat_list(value):
    with pytest.raises(TypeError, match="not a flat list of token ids"):
        encode_turn(Returns(value), [], "Hi")


def test_encode_turn_refuses_an_empty_result():
    with pytest.raises(ValueError, match="no tokens"):
        encode_turn(Returns([]), [], "Hi")


def test_a_real_tokenizer_gives_a_flat_list_and_the_pinned_date():
    """transformers changed what `apply_chat_template` returns between 4 and 5."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["[UNK]", "[26 Jul 2024]", "[TODAY]", "<user>", "<assistant>", "hi", "yes"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" | ", "removed")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.chat_template = (
        "[{{ date_string if date_string is defined else 'TODAY' }}]"
        "{% for m in messages %} | <{{ m.role }}> | {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} | <assistant>{% endif %}"
    )
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert encode_turn(tokenizer, history, "hi") == [1, 3, 5, 4, 6, 3, 5, 4]
    tokenizer.chat_template = None
    assert encode_turn(tokenizer, [], "hi | yes") == [5, 6]


# ---- hashes


def test_sha256_of_a_file_is_the_hash_of_the_bytes(tmp_path):
    path = write(tmp_path, GOOD)
    assert sha256_of(path) == hashlib.sha256(GOOD).hexdigest()
    path.write_bytes(GOOD.replace(b"\n", b"\r\n"))
    assert sha256_of(str(path)) != hashlib.sha256(GOOD).hexdigest()


def test_token_ids_sha256_does_not_move():
    """Result files record these values. They are recomputed from the documented bytes, and pinned once."""
    assert token_ids_sha256([[1, 2], [3]]) == hashlib.sha256(b"[[1,2],[3]]").hexdigest()
    assert token_ids_sha256([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


def test_token_ids_sha256_ignores_container_and_integer_type():
    numpy = pytest.importorskip("numpy")
    as_lists = token_ids_sha256([[1, 2], [3]])
    assert token_ids_sha256(((1, 2), (3,))) == as_lists
    assert token_ids_sha256(numpy.array(ids, dtype=numpy.int32) for ids in ([1, 2], [3])) == as_lists


def test_token_ids_sha256_tells_order_and_boundaries_apart():
    variants = (
        [[1, 2], [3]],
        [[1], [2, 3]],
        [[1, 2, 3]],
        [[3], [1, 2]],
        [[2, 1], [3]],
        [[12], [3]],
        [[1, 2], [3], []],
    )
    assert len({token_ids_sha256(variant) for variant in variants}) == len(variants)


# ---- imports


def test_the_module_itself_imports_neither_torch_nor_transformers():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, prompts.__file__], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
