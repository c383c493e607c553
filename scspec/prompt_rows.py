"""A row of a JSONL prompt file -> a prompt. `prompts/README.md` says what a row may be.

Reading is strict: what is not understood is an error that says what is wrong and what is allowed.

Not covered: files and their lines, and the token ids that a model is given (`scspec.prompts`).
"""

import json
from dataclasses import dataclass
from typing import Any

IDS = ("question_id", "id")
TEXTS = ("turns", "prompt", "messages", "prompt_token_ids")
ALLOWED_KEYS = (*IDS, "category", *TEXTS, "system", "max_new_tokens", "reference")
DEFAULT_CATEGORY = "uncategorised"

Messages = tuple[tuple[str, str], ...]  # (role, content) of each

_ROW = "one JSON object per line"
_TEXT = "a non-empty string"
_ROLES = "'system' at most first, then 'user' and 'assistant' in turn, the last one 'user'"


@dataclass(frozen=True)
class Prompt:
    """One prompt: its id, unique in its file; its category; the user's turns in order, at least one.

    turns: texts; or a single one of token ids, from which the model continues as they are. history: what was said
    before the first turn, a system message first. max_new_tokens: its budget for each turn, None for the configured
    one. reference: answers for a reader, which nothing is measured against.
    """

    prompt_id: str
    category: str
    turns: tuple[str | tuple[int, ...], ...]
    history: Messages = ()
    max_new_tokens: int | None = None
    reference: tuple[str, ...] = ()

    def budget(self, configured: int) -> int:
        """Return how many tokens each of the model's replies may have."""
        return configured if self.max_new_tokens is None else self.max_new_tokens


def parse_row(line: str) -> Prompt:
    """Return the prompt of one line. Raises `ValueError` with one line: what is wrong and what is allowed."""
    row = _parse_object(line)
    unknown = sorted(set(row) - set(ALLOWED_KEYS))
    if unknown:
        raise ValueError(f"unknown keys {unknown}; allowed: {', '.join(ALLOWED_KEYS)}")
    prompt_id, category = _prompt_id(row), _text(row.get("category", DEFAULT_CATEGORY), "category")
    history, turns = _conversation(row)
    budget = _integer(row["max_new_tokens"], "max_new_tokens", least=1) if "max_new_tokens" in row else None
    return Prompt(prompt_id, category, turns, history, budget, _reference(row.get("reference", [])))


def _parse_object(line: str) -> dict[str, Any]:
    """Return the JSON object of one line. Raises `ValueError` for anything else or a key given twice."""
    if not line.strip():
        raise ValueError(f"blank line; allowed: {_ROW}")
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON, {error.msg} at column {error.colno}; allowed: {_ROW}") from None
    except RecursionError:
        raise ValueError(f"invalid JSON, nested too deeply; allowed: {_ROW}") from None
    if not isinstance(row, dict):
        raise _wrong_type("the row", row, _ROW)
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Raises `ValueError` for a repeated key; `json` would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"keys {repeated} given more than once; allowed: each key once")
    return row


def _parse_int(digits: str) -> int:
    """Return an integer. Python refuses to convert thousands of digits, with an advice for programmers."""
    if len(digits) > 100:
        raise ValueError(f"an integer of {len(digits)} digits; allowed: at most 100")
    return int(digits)


def _prompt_id(row: dict[str, Any]) -> str:
    """Return the id of a row; an integer id, which Spec-Bench and MT-bench use, becomes its decimal text."""
    key = _one_key_of(row, *IDS)
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, key, allowed="a non-empty string or an integer")


def _conversation(row: dict[str, Any]) -> tuple[Messages, tuple[str | tuple[int, ...], ...]]:
    """Return (what was said before, turns) of a row."""
    kind = _one_key_of(row, *TEXTS)
    if kind == "prompt_token_ids":
        if "system" in row:
            raise ValueError(f"both 'system' and '{kind}', which no text is put before; allowed: one of them")
        ids = _list(row[kind], kind, "a list of one or more integers >= 0")
        return (), (tuple(_integer(token_id, f"{kind}[{index}]", least=0) for index, token_id in enumerate(ids)),)
    system = (("system", _text(row["system"], "system")),) if "system" in row else ()
    if kind == "messages":
        *history, (_, last) = _messages(row[kind])
        if system and history and history[0][0] == "system":
            raise ValueError("both 'system' and a system message in 'messages'; allowed: one of them")
        return (*system, *history), (last,)
    if kind == "prompt":
        return system, (_text(row[kind], kind),)
    turns = _list(row[kind], kind, "a list of one or more non-empty strings")
    return system, tuple(_text(turn, f"{kind}[{index}]") for index, turn in enumerate(turns))


def _messages(value: Any) -> list[tuple[str, str]]:
    """Return (role, content) of each message: a system's at most first, then a user's and an assistant's in turn."""
    messages = _list(value, "messages", "a list of one or more messages")
    said = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    begin = int(said[0][0] == "system")
    for index, (role, _) in enumerate(said[begin:], begin):
        if role != ("user", "assistant")[(index - begin) % 2]:
            raise ValueError(f"'messages[{index}]' has role {role!r}; allowed: {_ROLES}")
    if said[-1][0] != "user":
        raise ValueError(f"the last of 'messages' has role {said[-1][0]!r}; allowed: {_ROLES}")
    return said


def _message(value: Any, name: str) -> tuple[str, str]:
    allowed = "an object of 'role' and 'content'"
    if not isinstance(value, dict):
        raise _wrong_type(f"'{name}'", value, allowed)
    if set(value) != {"role", "content"}:
        raise ValueError(f"'{name}' has keys {sorted(value)}; allowed: {allowed}")
    return _text(value["role"], f"{name}.role"), _text(value["content"], f"{name}.content")


def _reference(value: Any) -> tuple[str, ...]:
    """Return the answers of a row. MT-bench has one a turn, some of them empty."""
    allowed = "a string or a list of strings"
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise _wrong_type("'reference'", value, allowed)
    return tuple(_string(text, f"reference[{index}]", allowed) for index, text in enumerate(texts))


def _one_key_of(row: dict[str, Any], *keys: str) -> str:
    """Return which of several keys the row has. Raises `ValueError` if it has more than one or none."""
    found = [key for key in keys if key in row]
    if len(found) > 1:
        raise ValueError(f"both '{found[0]}' and '{found[1]}'; allowed: exactly one of them")
    if not found:
        first, *others = (f"'{key}'" for key in keys)
        raise ValueError(f"missing {first} (or {', '.join(others)}); allowed: exactly one of them")
    return found[0]


def _list(value: Any, name: str, allowed: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong_type(f"'{name}'", value, allowed)
    if not value:
        raise ValueError(f"'{name}' is an empty list; allowed: {allowed}")
    return value


def _integer(value: Any, name: str, least: int) -> int:
    allowed = f"an integer >= {least}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(f"'{name}'", value, allowed)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"'{name}' is {value}; allowed: {allowed}")
    return value


def _text(value: Any, name: str, allowed: str = _TEXT) -> str:
    """Return `value` if it is a string that is not blank. Raises `ValueError` if not."""
    text = _string(value, name, allowed)
    if not text.strip():
        raise ValueError(f"'{name}' is empty; allowed: {allowed}")
    return text


def _string(value: Any, name: str, allowed: str) -> str:
    """Return `value` if it is a string that UTF-8 can write. Raises `ValueError` if not."""
    if not isinstance(value, str):
        raise _wrong_type(f"'{name}'", value, allowed)
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"'{name}' holds half of a surrogate pair; allowed: valid Unicode text")
    return value


def _wrong_type(what: str, value: Any, allowed: str) -> ValueError:
    """Return the error for a wrong type: a `ValueError`, as the file is at fault and not the call."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return ValueError(f"{what} is a JSON {names.get(type(value), 'number')}; allowed: {allowed}")
