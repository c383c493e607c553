"""Blocks of a text -> pieces: what its tokens say, and what became of each.

Not here: which prompts are shown. Nothing is fetched: where a model's tokenizer is not to be had here, its tokens are
shown as ids.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from scspec.aliases import folder_here

ACCEPTED, REJECTED, CORRECTION, BONUS = "accepted", "rejected", "correction", "bonus"
TRANSCRIPT_COLUMNS = ("kept", "accepted", "gamma", "proposed_ids", "emitted_ids")
_WINS = (ACCEPTED, BONUS, CORRECTION)  # where tokens of several kinds share one character, it is of the last of these

_INCOMPLETE = "\ufffd"
_BIDI_CONTROLS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *_BIDI_CONTROLS} - {ord("\t"), ord("\n")}
_NAMES = {code: f"[U+{code:04X}]" for code in _CONTROLS}


class Piece(NamedTuple):
    """A run of characters of one kind: ACCEPTED, REJECTED, CORRECTION or BONUS."""

    kind: str
    text: str


class Transcript(NamedTuple):
    """The pieces of each block that is shown; tokens: how many of the text these are; left_out: how many follow."""

    blocks: list[list[Piece]]
    tokens: int
    left_out: int


def visible(text: str) -> str:
    """A text with its control characters, and those that change the direction of writing, as "[U+202E]"; tabs and line
    feeds stay. What else could harm a page is the template's to escape."""
    return text.translate(_NAMES)


@cache
def tokenizer_here(model: str) -> Tokenizer | None:
    """The tokenizer of a model, None where it is not on this machine, has no tokenizer.json, or a broken one.

    model: alias, folder or Hugging Face id.
    """
    folder = folder_here(model)
    if folder is None:
        return None
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library has no class of its own for a file that is missing or that it cannot read
        return None


def transcript(blocks: Mapping[str, Iterable[Any]], tokenizer: Tokenizer | None, max_tokens: int) -> Transcript:
    """The text of one prompt and turn, block by block.

    blocks: TRANSCRIPT_COLUMNS of SCHEMA (a table, or a dict of columns), the rows in order and each of weight 1.

    Proposals after the first rejected one were never evaluated, and are left out; so is what a block emits beyond the
    token budget. The first blocks are shown, up to the one that reaches `max_tokens`. A token that ends within a
    character is shown with those that complete it. tokenizer: None shows ids.
    """
    reader = _Reader(tokenizer)
    shown, tokens, left_out = [], 0, 0
    for kept, *block in zip(*(blocks[name] for name in TRANSCRIPT_COLUMNS), strict=True):
        if tokens >= max_tokens:
            left_out += kept
            continue
        tokens += kept
        shown.append(_merged(reader.piece(*fate) for fate in _fates(kept, *block)))
    if not left_out and (rest := reader.rest()):
        shown[-1].append(rest)
    return Transcript(shown, int(tokens), int(left_out))


def _fates(
    kept: int, accepted: int, gamma: int, proposed: Sequence[int], emitted: Sequence[int]
) -> Iterator[tuple[str, int]]:
    """(kind, token) of a block: the accepted proposals, then a rejected one and its correction, or the bonus token.

    What lies behind EOS or the token budget is not there, and neither is a proposal rejected behind it.
    """
    yield from ((ACCEPTED, int(token)) for token in emitted[: min(accepted, kept)])
    if kept <= accepted:
        return
    if accepted < gamma:
        yield from ((REJECTED, int(token)) for token in proposed[accepted : accepted + 1])
    yield CORRECTION if accepted < gamma else BONUS, int(emitted[accepted])


def _merged(pieces: Iterator[Piece | None]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    merged: list[Piece] = []
    for piece in pieces:
        if piece is None:
            continue
        if merged and merged[-1].kind == piece.kind:
            merged[-1] = Piece(piece.kind, merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return merged


class _Reader:
    """Reads the tokens of a text one after another."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: Sequence[str] = ()  # the kinds of tokens whose characters are not complete

    def piece(self, kind: str, token: int) -> Piece | None:
        """What a token says where it stands, None if it ends within a character. A rejected one does not stay."""
        if kind == REJECTED:
            return _piece(kind, self._text(copy(self._stream), token) or _INCOMPLETE)
        text = self._text(self._stream, token)
        kinds = (*self._held, kind)
        self._held = () if text else kinds
        return _piece(max(kinds, key=_WINS.index), text) if text else None

    def rest(self) -> Piece | None:
        """What is left of a text that ends within a character."""
        return _piece(max(self._held, key=_WINS.index), _INCOMPLETE) if self._held else None

    def _text(self, stream: DecodeStream, token: int) -> str | None:
        if self._tokenizer is None:
            return f"{token} "
        if self._tokenizer.id_to_token(token) is None:  # of a vocabulary that is padded
            return f"[{token}]"
        return stream.step(self._tokenizer, token)


def _piece(kind: str, text: str) -> Piece:
    """A piece as it is shown: line feeds that are no accepted token's get a sign, and a rejected one breaks no line."""
    if kind != ACCEPTED:
        text = text.replace("\n", "\u21b5" if kind == REJECTED else "\u21b5\n")
    return Piece(kind, visible(text))
