"""Instructions that a draft's training texts start from: seeded, varied, and none of them from `prompts/`.

Of each instruction either the whole is given, or only its first words, and the target completes it.
"""

import random
from pathlib import Path

import yaml

_MATERIAL = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
#: How many of the instructions are first words only.
OPEN_SHARE = 0.4


def instructions(count: int, seed: int) -> list[tuple[str, bool]]:
    """Return `count` (text, complete): instructions, or where `complete` is False, the first words of one."""
    rng = random.Random(seed)
    return [_instruction(rng) for _ in range(count)]


def _instruction(rng: random.Random) -> tuple[str, bool]:
    if rng.random() < OPEN_SHARE:
        return rng.choice(_MATERIAL["openings"]), False
    kind = rng.choice(list(_MATERIAL["templates"].values()))
    text = rng.choice(kind).replace("{text}", " ".join(rng.sample(_MATERIAL["events"], rng.randint(2, 4))))
    for name, values in _MATERIAL["slots"].items():
        chosen = rng.sample(range(*values) if isinstance(values[0], int) else values, 3)
        for slot, value in zip((name, f"{name}2", f"{name}3"), chosen, strict=True):
            text = text.replace(f"{{{slot}}}", str(value))
    return text[:1].upper() + text[1:], True
