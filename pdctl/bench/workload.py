"""Workloads: synthetic prompts, shared prefixes, prompts from a file. If the service can tokenize, prompts are token
ids, so that their lengths are exact."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdctl.bench import Asked
from pdctl.errors import PdctlError
from pdctl.user_files import read_user_text

# Words that are likely single tokens; which ones does not matter.
_WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother",
    "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business",
    "issue", "side", "kind", "head", "house", "service", "friend",
]  # fmt: skip
_LENGTHS = re.compile(
    r"(?P<low>\d+)(?:-(?P<high>\d+))?|(?P<kind>normal|lognormal):(?P<mean>\d+):(?P<spread>\d+(?:\.\d+)?)"
)
_LONGEST = 1_048_576

# Draws a length.
Lengths = Callable[[random.Random], int]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids to make prompts of. Empty if the service does not tokenize; then prompts are made of words."""

    ids: tuple[int, ...] = ()

    def prompt(self, length: int, rng: random.Random) -> list[int] | str:
        """A prompt of `length` tokens, or of `length` words if there are no token ids."""
        if self.ids:
            return rng.choices(self.ids, k=length)
        return " ".join(rng.choices(_WORDS, k=length))


def sentence(words: int = 400) -> str:
    """A text that the service tokenizes to get a vocabulary."""
    return " ".join(_WORDS[number % len(_WORDS)] for number in range(words))


def lengths(text: str, option: str) -> Lengths:
    """Parse `512`, `100-900` (uniform), `normal:500:100` or `lognormal:500:0.8` (median, sigma). Raises PdctlError."""
    found = _LENGTHS.fullmatch(text.strip())
    hint = "such as 512, 100-900, normal:500:100 or lognormal:500:0.8"
    if found is None:
        raise PdctlError(f"{option} {text!r} is not a length", hint)
    if found["kind"]:
        mean, spread = int(found["mean"]), float(found["spread"])
        if not mean:
            raise PdctlError(f"{option} {text!r}: lengths must be at least 1", hint)
        if found["kind"] == "normal":
            return lambda rng: _within(rng.gauss(mean, spread))
        return lambda rng: _within(mean * rng.lognormvariate(0.0, spread))
    low, high = int(found["low"]), int(found["high"] or found["low"])
    if not 0 < low <= high <= _LONGEST:
        raise PdctlError(f"{option} {text!r}: lengths must be from 1 to {_LONGEST}, the lower one first", hint)
    return lambda rng: rng.randint(low, high)


def _within(value: float) -> int:
    return max(1, min(_LONGEST, round(value)))


def synthetic(count: int, inputs: Lengths, outputs: Lengths, words: Vocabulary, rng: random.Random) -> list[Asked]:
    """Requests with independent prompts."""
    return [Asked(words.prompt(inputs(rng), rng), outputs(rng)) for _ in range(count)]


def shared_prefix(
    count: int, prefixes: int, prefix: int, inputs: Lengths, outputs: Lengths, words: Vocabulary, rng: random.Random
) -> list[Asked]:
    """Requests that begin with one of `prefixes` common prefixes of `prefix` tokens each."""
    common = [words.prompt(prefix, rng) for _ in range(prefixes)]
    return [Asked(joined(rng.choice(common), words.prompt(inputs(rng), rng)), outputs(rng)) for _ in range(count)]


def joined(first: list[int] | str, second: list[int] | str) -> list[int] | str:
    """Join two prompts of the same type."""
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    return f"{first} {second}"


def from_file(path: Path, outputs: Lengths, rng: random.Random) -> list[Asked]:
    """Read JSON lines with `prompt` (text or token ids) and, optionally, `max_tokens` or `output_tokens`.

    Raises PdctlError that lists the first malformed lines."""
    found, broken = [], []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, most = entry["prompt"], entry.get("max_tokens", entry.get("output_tokens"))
            is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
            if not prompt or not (isinstance(prompt, str) or is_ids) or (most is not None and int(most) < 1):
                raise ValueError
            found.append(Asked(prompt, int(most) if most is not None else outputs(rng)))
        except (ValueError, KeyError, TypeError, AttributeError):
            broken.append(number)
    refuse_broken(path, broken, 'each line must be like {"prompt": "Once upon a time", "max_tokens": 32}')
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a file. Raises PdctlError."""
    try:
        return read_user_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        raise PdctlError(f"{path} cannot be read: {failure}") from None


def refuse_broken(path: Path, broken: list[int], hint: str) -> None:
    """Raise PdctlError if there are malformed lines."""
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise PdctlError(f"{path}: malformed line{'s' if len(broken) > 1 else ''} {shown}", hint)
