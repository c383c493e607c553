"""What a row of a prompt file may say, and how each of its faults is named."""

import json
from pathlib import Path

import pytest

from scspec.prompts import Prompt, load_prompts

GOOD = b'{"id": "first", "prompt": "Hello there."}\n'


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    return path


# ---- rows that are accepted


def messages(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def test_every_accepted_shape_keeps_file_order(tmp_path):
    rows = [
        {"question_id": "b", "category": "maths", "turns": ["One?", "Two?"]},
        {"id": "a", "prompt": "Grüße, 世界"},
        {"question_id": 81, "category": "writing", "prompt": " spaces stay "},
        {"id": "chat", "messages": messages(("user", "Hi"), ("assistant", "Yes?"), ("user", "Go on"))},
        {"id": "system first", "messages": messages(("system", "Be brief."), ("user", "Hi"))},
        {"id": "one text", "system": "Be brief.", "prompt": "Hi"},
        {"id": "one message", "system": "Be brief.", "messages": messages(("user", "Hi"))},
        {"id": "system", "system": "Be brief.", "turns": ["One?", "Two?"]},
        {"id": "ids", "prompt_token_ids": [3, 0, 3], "max_new_tokens": 1},
        {"id": "known", "prompt": "Hi", "reference": "Hello"},
        {"id": "as MT-bench", "turns": ["One?", "Two?"], "reference": ["One.", ""]},
    ]
    path = write(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert load_prompts(path) == [
        Prompt("b", "maths", ("One?", "Two?")),
        Prompt("a", "uncategorised", ("Grüße, 世界",)),
        Prompt("81", "writing", (" spaces stay ",)),
        Prompt("chat", "uncategorised", ("Go on",), (("user", "Hi"), ("assistant", "Yes?"))),
        Prompt("system first", "uncategorised", ("Hi",), (("system", "Be brief."),)),
        Prompt("one text", "uncategorised", ("Hi",), (("system", "Be brief."),)),
        Prompt("one message", "uncategorised", ("Hi",), (("system", "Be brief."),)),
        Prompt("system", "uncategorised", ("One?", "Two?"), (("system", "Be brief."),)),
        Prompt("ids", "uncategorised", ((3, 0, 3),), max_new_tokens=1),
        Prompt("known", "uncategorised", ("Hi",), reference=("Hello",)),
        Prompt("as MT-bench", "uncategorised", ("One?", "Two?"), reference=("One.", "")),
    ]


def test_a_prompt_is_frozen_and_hashable():
    prompt = Prompt("a", "maths", ("One?",))
    with pytest.raises(AttributeError):
        prompt.category = "code"
    assert len({prompt, Prompt("a", "maths", ("One?",)), Prompt("a", "code", ("One?",))}) == 2


def test_a_budget_of_its_own_goes_before_the_configured_one():
    assert Prompt("a", "maths", ("One?",)).budget(16) == 16
    assert Prompt("a", "maths", ("One?",), max_new_tokens=99).budget(16) == 99


# ---- rows that are refused: line 2 of the file, a name of the fault, what is allowed

BAD_ROWS = {
    "cut short": (b'{"id": "x", "prompt": "Hi"', "invalid JSON", "one JSON object per line"),
    "nested deeply": (b"[" * 100_000, "nested too deeply", "one JSON object per line"),
    "blank line": (b"   \n" + GOOD, "blank line", "one JSON object per line"),
    "trailing blank line": (b"\n", "blank line", "one JSON object per line"),
    "list": (b'["x", "Hi"]', "the row is a JSON list", "one JSON object per line"),
    "string": (b'"Hi"', "the row is a JSON string", "one JSON object per line"),
    "null": (b"null", "the row is a JSON null", "one JSON object per line"),
    "unknown key": (b'{"id": "x", "promt": "Hi"}', "unknown keys ['promt']", "question_id, id, category"),
    "no id": (b'{"prompt": "Hi"}', "missing 'question_id' (or 'id')", "exactly one of them"),
    "no text": (b'{"id": "x"}', "missing 'turns' (or 'prompt', 'messages', 'prompt_token_ids')", "one"),
    "two ids": (b'{"id": "x", "question_id": "x", "prompt": "Hi"}', "both 'question_id' and 'id'", "one"),
    "two texts": (b'{"id": "x", "turns": ["Hi"], "prompt": "Hi"}', "both 'turns' and 'prompt'", "one"),
    "key twice": (
        b'{"id": "x", "prompt": "a", "prompt": "b"}',
        "keys ['prompt'] given more",
        "each key once",
    ),
    "no turns": (b'{"id": "x", "turns": []}', "'turns' is an empty list", "non-empty strings"),
    "empty turn": (b'{"id": "x", "turns": ["Hi", ""]}', "'turns[1]' is empty", "a non-empty string"),
    "blank turn": (b'{"id": "x", "turns": [" \\n "]}', "'turns[0]' is empty", "a non-empty string"),
    "empty prompt": (b'{"id": "x", "prompt": ""}', "'prompt' is empty", "a non-empty string"),
    "turns a string": (b'{"id": "x", "turns": "Hi"}', "'turns' is a JSON string", "a list of one or more"),
    "turn a number": (b'{"id": "x", "turns": [3]}', "'turns[0]' is a JSON number", "a non-empty string"),
    "prompt a list": (b'{"id": "x", "prompt": ["Hi"]}', "'prompt' is a JSON list", "a non-empty string"),
    "id null": (b'{"id": null, "prompt": "Hi"}', "'id' is a JSON null", "a non-empty string or an integer"),
    "id true": (
        b'{"id": true, "prompt": "Hi"}',
        "'id' is a JSON boolean",
        "a non-empty string or an integer",
    ),
    "id 1.5": (b'{"id": 1.5, "prompt": "Hi"}', "'id' is a JSON number", "a non-empty string or an integer"),
    "id empty": (b'{"id": "", "prompt": "Hi"}', "'id' is empty", "a non-empty string or an integer"),
    "category 3": (b'{"id": "x", "category": 3, "prompt": "Hi"}', "'category' is a JSON number", "string"),
    "category empty": (b'{"id": "x", "category": "", "prompt": "Hi"}', "'category' is empty", "string"),
    "surrogate": (b'{"id": "x", "prompt": "\\ud83d"}', "half of a surrogate pair", "valid Unicode text"),
    "id again": (b'{"id": "first", "prompt": "Hi"}', "id 'first' is already used in line 1", "each id once"),
    "latin-1": ('{"id": "x", "prompt": "café"}'.encode("latin-1"), "wrong encoding, byte 0xe9", "UTF-8"),
}


@pytest.mark.parametrize(("row", "wrong", "allowed"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_refused_in_one_line(tmp_path, row, wrong, allowed):
    path = write(tmp_path, GOOD + row + b'\n{"id": "last", "prompt": "Bye."}\n')
    with pytest.raises(ValueError, match="allowed: ") as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: ")
    fault, _, remedy = message.removeprefix(f"{path}, line 2: ").partition("; allowed: ")
    assert wrong in fault
    assert allowed in remedy
    assert "\n" not in message


# ---- rows whose texts, token ids, budget or reference are refused: as above

ROLES = "'system' at most first, then 'user' and 'assistant' in turn, the last one 'user'"
BAD_VALUES = {
    "three texts": ({"prompt": "a", "messages": [], "prompt_token_ids": [1]}, "both 'prompt' and 'messages'", "one"),
    "messages a string": ({"messages": "Hi"}, "'messages' is a JSON string", "a list of one or more messages"),
    "no messages": ({"messages": []}, "'messages' is an empty list", "a list of one or more messages"),
    "message a string": ({"messages": ["Hi"]}, "'messages[0]' is a JSON string", "'role' and 'content'"),
    "no content": ({"messages": [{"role": "user"}]}, "'messages[0]' has keys ['role']", "'role' and 'content'"),
    "a name": (
        {"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]},
        "'messages[0]' has keys ['content', 'name', 'role']",
        "'role' and 'content'",
    ),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        "'messages[0].content' is a JSON list",
        "a non-empty string",
    ),
    "content empty": ({"messages": messages(("user", " "))}, "'messages[0].content' is empty", "non-empty"),
    "role null": ({"messages": [{"role": None, "content": "Hi"}]}, "'messages[0].role' is a JSON null", "string"),
    "role tool": ({"messages": messages(("user", "a"), ("tool", "b"))}, "'messages[1]' has role 'tool'", ROLES),
    "two users": ({"messages": messages(("user", "a"), ("user", "b"))}, "'messages[1]' has role 'user'", ROLES),
    "assistant first": ({"messages": messages(("assistant", "a"))}, "'messages[0]' has role 'assistant'", ROLES),
    "assistant after system": (
        {"messages": messages(("system", "s"), ("assistant", "a"), ("user", "u"))},
        "'messages[1]' has role 'assistant'",
        ROLES,
    ),
    "system later": (
        {"messages": messages(("user", "u"), ("system", "s"), ("user", "u"))},
        "'messages[1]' has role 'system'",
        ROLES,
    ),
    "assistant last": (
        {"messages": messages(("user", "u"), ("assistant", "a"))},
        "the last of 'messages' has role 'assistant'",
        ROLES,
    ),
    "system alone": ({"messages": messages(("system", "s"))}, "the last of 'messages' has role 'system'", ROLES),
    "two systems": (
        {"system": "t", "messages": messages(("system", "s"), ("user", "u"))},
        "both 'system' and a system message in 'messages'",
        "one of them",
    ),
    "system of ids": ({"system": "s", "prompt_token_ids": [1]}, "both 'system' and 'prompt_token_ids'", "one"),
    "system empty": ({"system": "", "prompt": "Hi"}, "'system' is empty", "a non-empty string"),
    "system null": ({"system": None, "prompt": "Hi"}, "'system' is a JSON null", "a non-empty string"),
    "ids a number": ({"prompt_token_ids": 3}, "'prompt_token_ids' is a JSON number", "integers >= 0"),
    "no ids": ({"prompt_token_ids": []}, "'prompt_token_ids' is an empty list", "integers >= 0"),
    "an id below 0": ({"prompt_token_ids": [1, -1]}, "'prompt_token_ids[1]' is -1", "an integer >= 0"),
    "an id of 1.0": ({"prompt_token_ids": [1.0]}, "'prompt_token_ids[0]' is 1.0", "an integer >= 0"),
    "an id true": ({"prompt_token_ids": [True]}, "'prompt_token_ids[0]' is a JSON boolean", "an integer >= 0"),
    "ids in a list": ({"prompt_token_ids": [[1]]}, "'prompt_token_ids[0]' is a JSON list", "an integer >= 0"),
    "budget 0": ({"prompt": "Hi", "max_new_tokens": 0}, "'max_new_tokens' is 0", "an integer >= 1"),
    "budget 1.5": ({"prompt": "Hi", "max_new_tokens": 1.5}, "'max_new_tokens' is 1.5", "an integer >= 1"),
    "budget true": ({"prompt": "Hi", "max_new_tokens": True}, "'max_new_tokens' is a JSON boolean", ">= 1"),
    "budget null": ({"prompt": "Hi", "max_new_tokens": None}, "'max_new_tokens' is a JSON null", ">= 1"),
    "reference 5": ({"prompt": "Hi", "reference": 5}, "'reference' is a JSON number", "or a list of strings"),
    "references 5": ({"prompt": "Hi", "reference": ["a", 5]}, "'reference[1]' is a JSON number", "list of strings"),
    "reference null": ({"prompt": "Hi", "reference": None}, "'reference' is a JSON null", "or a list of strings"),
}


@pytest.mark.parametrize(("values", "wrong", "allowed"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_is_refused_in_one_line(tmp_path, values, wrong, allowed):
    test_a_bad_row_is_refused_in_one_line(tmp_path, json.dumps({"id": "x", **values}).encode(), wrong, allowed)


def test_an_integer_that_python_would_not_read_is_refused_in_one_line(tmp_path):
    row = b'{"id": "x", "prompt": "Hi", "max_new_tokens": ' + b"9" * 5000 + b"}"
    test_a_bad_row_is_refused_in_one_line(tmp_path, row, "an integer of 5000 digits", "at most 100")
