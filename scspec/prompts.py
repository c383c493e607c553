"""Prompt files -> prompts -> token ids, with hashes of both ends.

A prompt file is JSONL in UTF-8, one object per line, in the shape of Spec-Bench and MT-bench
(`prompts/README.md`). Reading is strict: a row that is not understood is an error that names its line, never
a row that is skipped.

Not covered: batching, truncation to a context length, and decoding token ids back to text. The tokenizer is
passed in, so this module needs neither transformers nor torch.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOWED_KEYS = ("question_id", "id", "category", "turns", "prompt")
DEFAULT_CATEGORY = "uncategorised"
# The day that Llama 3.1's own template prints if it is told none; later templates print today's.
TEMPLATE_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Prompt:
    """One prompt: its id, unique in its file; its category; the user's turns in order, at least one."""

    prompt_id: str
    category: str
    turns: tuple[str, ...]


def load_prompts(path: str | Path) -> list[Prompt]:
    """Return the prompts of a JSONL file, in file order.

    A row has `question_id` or `id` (a non-empty string, or an integer, which becomes its decimal text),
    optionally `category`, and either `turns` (a list of non-empty strings) or `prompt` (one string, one
    turn).

    Raises `FileNotFoundError` if there is no such file, and `ValueError` with one line that names the file,
    the line number, what is wrong and what is allowed, for the first bad row.
    """
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            prompt = _parse_prompt(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        earlier = line_of.setdefault(prompt.prompt_id, number)
        if earlier != number:
            wrong = f"id {prompt.prompt_id!r} is already used in line {earlier}"
            raise ValueError(f"{path}, line {number}: {wrong}; allowed: each id once")
        prompts.append(prompt)
    return prompts


def encode_turn(
    tokenizer: Any, history: Sequence[dict[str, str]], user_text: str, date_string: str = TEMPLATE_DATE
) -> list[int]:
    """Return the token ids the model continues from to answer `user_text`, as a flat list of Python ints.

    `history` holds the earlier messages as `{"role": ..., "content": ...}`, the assistant's replies included;
    it is not changed. The tokenizer's chat template is applied to history and user message, up to and
    including the header of the assistant's reply. `date_string` is handed to the template: Llama 3 templates
    print today's date without it. (Only that name is pinned: a template that calls `strftime_now` whatever it
    is given still prints today.)

    A tokenizer without a chat template gets the plain text instead: the contents of all messages joined by
    blank lines, without roles, encoded by `tokenizer(text)` with the special tokens that it adds by itself.

    Raises `ValueError` if the result is empty, and `TypeError` if the tokenizer returns anything but a flat
    list of ids.
    """
    messages = [*history, {"role": "user", "content": user_text}]
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=date_string
        )
    else:
        ids = tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
    return _flat_ids(ids)


def token_ids_sha256(id_lists: Iterable[Iterable[int]]) -> str:
    """Return the SHA-256 (64 hex digits) of lists of token ids.

    It depends on the ids, their order and where one list ends and the next begins, and on nothing else: not
    on the container or integer type, the Python version or the process. The hashed bytes are the JSON text
    without spaces, for example `[[1,2],[3]]`.
    """
    plain = [[int(token_id) for token_id in ids] for ids in id_lists]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode("ascii")).hexdigest()


def _read_lines(path: str | Path) -> list[str]:
    """Return the lines of a UTF-8 file. Raises as `load_prompts` says: missing, empty or not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such prompt file; allowed: the path of a JSONL file") from None
    if not data.strip():
        raise ValueError(f"{path}, line 1: the file is empty; allowed: one JSON object per line")
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{path}, line 1: starts with a byte order mark; allowed: UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        bad = data[error.start]
        raise ValueError(f"{path}, line {number}: wrong encoding, byte 0x{bad:02x}; allowed: UTF-8") from None
    # Not splitlines(): U+2028 and its like end a line there, but may stand unescaped inside a JSON string.
    return text.removesuffix("\n").split("\n")


def _parse_prompt(line: str) -> Prompt:
    """Return the prompt of one line. Raises `ValueError` that says what is wrong and what is allowed."""
    row = _parse_object(line)
    unknown = sorted(set(row) - set(ALLOWED_KEYS))
    if unknown:
        raise ValueError(f"unknown keys {unknown}; allowed: {', '.join(ALLOWED_KEYS)}")
    category = _text(row.get("category", DEFAULT_CATEGORY), "category")
    return Prompt(_prompt_id(row), category, _turns(row))


def _parse_object(line: str) -> dict[str, Any]:
    """Return the JSON object of one line. Raises `ValueError` for anything else or a key given twice."""
    if not line.strip():
        raise ValueError("blank line; allowed: one JSON object per line")
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise ValueError(f"invalid JSON, {where}; allowed: one JSON object per line") from None
    except RecursionError:
        raise ValueError("invalid JSON, nested too deeply; allowed: one JSON object per line") from None
    if not isinstance(row, dict):
        raise _wrong_type("the row", row, "one JSON object per line")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Raises `ValueError` for a repeated key; `json` would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"keys {repeated} given more than once; allowed: each key once")
    return row


def _prompt_id(row: dict[str, Any]) -> str:
    """Return the id of a row; an integer id, which Spec-Bench and MT-bench use, becomes its decimal text."""
    key = _one_key_of(row, "question_id", "id")
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, key, allowed="a non-empty string or an integer")


def _turns(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the turns of a row, or its `prompt` as the only one."""
    if _one_key_of(row, "turns", "prompt") == "prompt":
        return (_text(row["prompt"], "prompt"),)
    turns = row["turns"]
    allowed = "a list of one or more non-empty strings"
    if not isinstance(turns, list):
        raise _wrong_type("'turns'", turns, allowed)
    if not turns:
        raise ValueError(f"'turns' is an empty list; allowed: {allowed}")
    return tuple(_text(turn, f"turns[{index}]") for index, turn in enumerate(turns))


def _one_key_of(row: dict[str, Any], first: str, second: str) -> str:
    """Return which of two keys the row has. Raises `ValueError` if it has both or neither."""
    if first in row and second in row:
        raise ValueError(f"both '{first}' and '{second}'; allowed: exactly one of them")
    if first not in row and second not in row:
        raise ValueError(f"missing '{first}' (or '{second}'); allowed: exactly one of them")
    return first if first in row else second


def _text(value: Any, name: str, allowed: str = "a non-empty string") -> str:
    """Return `value` if it is a string, not blank, that UTF-8 can write. Raises `ValueError` if not."""
    if not isinstance(value, str):
        raise _wrong_type(f"'{name}'", value, allowed)
    if not value.strip():
        raise ValueError(f"'{name}' is empty; allowed: {allowed}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"'{name}' holds half of a surrogate pair; allowed: valid Unicode text")
    return value


def _wrong_type(what: str, value: Any, allowed: str) -> ValueError:
    """Return the error for a wrong type: a `ValueError`, as the file is at fault and not the call."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return ValueError(f"{what} is a JSON {names.get(type(value), 'number')}; allowed: {allowed}")


def _flat_ids(ids: Any) -> list[int]:
    """Return a tokenizer's output as Python ints. `ValueError` if empty, `TypeError` if not a flat list."""
    if not isinstance(ids, list) or any(isinstance(token_id, list | str) for token_id in ids):
        raise TypeError(f"the tokenizer returned {type(ids).__name__}, not a flat list of token ids")
    if not ids:
        raise ValueError("the prompt encodes to no tokens; a model needs at least one to continue from")
    return [int(token_id) for token_id in ids]
