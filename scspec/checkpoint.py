"""What a cell has decoded so far, kept beside its output: a run that was killed goes on at the next prompt.

Each attempt at a cell appends to a hidden file of its own, `.OUTPUT.PID.RANDOM.partial`: a line that says what would
change the results (the key), then a line for each prompt that has finished its last turn. It reads what others left
once, before it decodes. So attempts at the same time need no lock and share no file: a job that is requeued while its
predecessor still dies, or two users of one folder. Decoding is deterministic, so a prompt that two of them have
finished is the same in both.

Not covered: a prompt half decoded, which begins again at its first turn.
"""

import glob
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scspec import provenance
from scspec.results import failures_name


@dataclass(frozen=True)
class FinishedPrompt:
    """A prompt decoded to its end: the ids that each turn started from, and its rows without what is the cell's."""

    prompt_id: str
    token_ids: list[list[int]]
    rows: list[dict[str, Any]]


class Checkpoint:
    """The finished prompts of the cell that is to be written to `output`; its clock runs from now on.

    `finished` maps the id of each prompt to what came of it, those of other attempts included once `resume` has run.
    """

    def __init__(self, output: Path):
        self.finished: dict[str, FinishedPrompt] = {}
        self._output, self._began_s = output, time.perf_counter()
        self._path = output.parent / f".{output.name}.{os.getpid()}.{secrets.token_hex(6)}.partial"
        self._header: dict[str, Any] = {}
        self._origin = {
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": provenance.host(),
            "job": provenance.slurm_job(),
        }
        self._earlier: list[dict[str, Any]] = []

    def resume(self, key: dict[str, Any]) -> None:
        """Take over what attempts of the same key have finished, and begin this one's file.

        `key` holds all that could change a result, in JSON types. What is torn, unreadable or of another key is named
        on stderr, left where it is, and decoded again. Raises OSError if nothing can be written beside the output.
        """
        self._header = {"key": json.loads(json.dumps(key)), **self._origin}
        for header, lines in sorted(self._matching(), key=lambda found: found[0]["started_at"]):
            self._take_over(header, lines)
        if self.finished:
            print(f"prompts taken over from earlier runs: {len(self.finished)}", file=sys.stderr)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._append()

    def save(self, prompt: FinishedPrompt) -> None:
        """Keep a prompt for whoever resumes, on disk when this returns. Raises OSError naming the file."""
        self._append({**asdict(prompt), "wall_time_s": self._wall_time_s()})
        self.finished[prompt.prompt_id] = prompt

    def attempts(self) -> list[dict[str, Any]]:
        """Return this attempt and those that prompts came from, the earliest first, for the metadata of the cell.

        Of each: started_at, host, job (in Slurm, else null), wall_time_s (until the last prompt that came from it),
        prompts (how many).
        """
        own = len(self.finished) - sum(attempt["prompts"] for attempt in self._earlier)
        this = {**self._origin, "wall_time_s": self._wall_time_s(), "prompts": own}
        return sorted([*self._earlier, this], key=lambda attempt: attempt["started_at"])

    def remove(self) -> None:
        """Delete the files of all attempts, once the output is written; one that stays is named on stderr."""
        for path in self._files():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # the result is there: a left file is no reason to fail
                print(f"{path}: not removed: {error.strerror}", file=sys.stderr)

    def _wall_time_s(self) -> float:
        return time.perf_counter() - self._began_s

    def _files(self) -> list[Path]:
        return sorted(self._output.parent.glob(f".{glob.escape(self._output.name)}.*.partial"))

    def _append(self, *lines: dict[str, Any]) -> None:
        """Write to this attempt's file, which is begun again if another attempt finished the cell and removed it."""
        with failures_name(self._path), open(self._path, "ab") as file:
            for line in lines if file.tell() else (self._header, *lines):
                file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _matching(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The (header, prompts' lines) of each file of the same key."""
        for path in self._files():
            try:
                header, *lines = _read(path)
                if differing := list(_differences(header["key"], self._header["key"])):
                    raise ValueError(f"this run differs in {', '.join(differing)}")
            except (OSError, ValueError) as error:
                print(f"{path}: not used, its prompts are decoded again: {error}", file=sys.stderr)
            else:
                yield header, lines

    def _take_over(self, header: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        new = [line for line in lines if line["prompt_id"] not in self.finished]
        if new:
            origin = {name: header[name] for name in self._origin}
            self._earlier.append({**origin, "wall_time_s": new[-1]["wall_time_s"], "prompts": len(new)})
        for line in new:
            prompt = FinishedPrompt(line["prompt_id"], line["token_ids"], line["rows"])
            self.finished[prompt.prompt_id] = prompt


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a partial file, the header first; a torn one is left out and named on stderr.

    Raises OSError, or ValueError if there is no header.
    """
    *whole, torn = path.read_bytes().split(b"\n")
    lines, broken = [], bool(torn)
    for line in whole:
        try:
            lines.append(json.loads(line))
        except ValueError:
            broken = True
    if not lines or "key" not in lines[0]:
        raise ValueError("its first line is torn")
    if broken:
        print(f"{path}: a line of it is torn, its prompt is decoded again", file=sys.stderr)
    return lines


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """The names of what differs between two keys, those of inner dicts behind a dot."""
    for name in sorted(found.keys() | wanted.keys()):
        ours, theirs = wanted.get(name), found.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from (f"{name}.{inner}" for inner in _differences(theirs, ours))
        elif ours != theirs:
            yield name
