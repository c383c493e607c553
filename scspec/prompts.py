"""Prompt files -> prompts -> token ids, with a hash of the latter.

A prompt file is JSONL or plain text, in UTF-8, gzipped or not (`prompts/README.md`). Reading is strict: a row that is
not understood is an error that names its line, never a row that is skipped.

Not covered: what a row may say (`scspec.prompt_rows`), batching, truncation to a context length, and decoding token ids
back to text. The tokenizer is passed in, so this module needs neither transformers nor torch.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scspec.prompt_rows import DEFAULT_CATEGORY, Prompt, parse_row

# The day that Llama 3.1's own template prints if it is told none; later templates print today's.
TEMPLATE_DATE = "26 Jul 2024"


def load_prompts(path: str | Path) -> list[Prompt]:
    """Return the prompts of a file, in file order; at least one.

    A name that ends in `.txt` is plain text: each line that is not blank is a prompt, its id the number of the line,
    counted from 1. Any other is JSONL, one `parse_row` a line. A name that ends in `.gz` is gzipped, and what stands
    before that ending says which of the two it is.

    Raises `FileNotFoundError` if there is no such file or it cannot be read, and `ValueError` with one line that names
    the file, the line number, what is wrong and what is allowed, for the first bad row.
    """
    lines = _read_lines(path)
    if str(path).lower().removesuffix(".gz").endswith(".txt"):
        texts = ((number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip())
        return [Prompt(str(number), DEFAULT_CATEGORY, (text,)) for number, text in texts]
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            prompt = parse_row(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        earlier = line_of.setdefault(prompt.prompt_id, number)
        if earlier != number:
            wrong = f"id {prompt.prompt_id!r} is already used in line {earlier}"
            raise ValueError(f"{path}, line {number}: {wrong}; allowed: each id once")
        prompts.append(prompt)
    return prompts


def turn_ids(tokenizer: Any, prompt: Prompt, replies: Sequence[str] = ()) -> list[int]:
    """Return the token ids the model continues from in a prompt's next turn, as a flat list of Python ints.

    `replies` are those to the turns before it, so none for the first. A turn of token ids is returned as it is; of a
    text, the ids are `encode_turn`'s after all that was said before, and the same errors are raised.
    """
    turn = prompt.turns[len(replies)]
    if not isinstance(turn, str):
        return list(turn)
    said = list(prompt.history)
    texts = [text for text in prompt.turns if isinstance(text, str)]  # all of them: where one is a text, all are
    for text, reply in zip(texts, replies, strict=False):  # turns without a reply are still to come
        said += [("user", text), ("assistant", reply)]
    return encode_turn(tokenizer, [{"role": role, "content": content} for role, content in said], turn)


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
    """Return the lines of a UTF-8 file. Raises as `load_prompts` says: unreadable, empty or not UTF-8."""
    data = _read_bytes(path)
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{path}, line 1: starts with a byte order mark; allowed: UTF-8 without one")
    wrong_at = data.find(0)  # UTF-8 would take it, and text in UTF-16 is full of it
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong_at = error.start
    if wrong_at >= 0:
        number = data.count(b"\n", 0, wrong_at) + 1
        wrong = f"wrong encoding, byte 0x{data[wrong_at]:02x}"
        raise ValueError(f"{path}, line {number}: {wrong}; allowed: UTF-8")
    if not text.strip():
        raise ValueError(f"{path}, line 1: the file is empty; allowed: one prompt or more")
    # Not splitlines(): U+2028 and its like end a line there, but may stand unescaped inside a JSON string.
    return text.removesuffix("\n").split("\n")


def _read_bytes(path: str | Path) -> bytes:
    """Return a file's bytes, unpacked if its name ends in `.gz`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        allowed = "the path of a prompt file"
        raise FileNotFoundError(f"{path}: cannot be read ({error.strerror}); allowed: {allowed}") from None
    if not str(path).lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); allowed: gzip, as the name says") from None


def _flat_ids(ids: Any) -> list[int]:
    """Return a tokenizer's output as Python ints. `ValueError` if empty, `TypeError` if not a flat list."""
    if not isinstance(ids, list) or any(isinstance(token_id, list | str) for token_id in ids):
        raise TypeError(f"the tokenizer returned {type(ids).__name__}, not a flat list of token ids")
    if not ids:
        raise ValueError("the prompt encodes to no tokens; a model needs at least one to continue from")
    return [int(token_id) for token_id in ids]
