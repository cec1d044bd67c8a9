"""Public request traces: Azure (CSV: time, input and output tokens) and Mooncake (JSON lines, with the hashes of each
prompt's 512-token blocks, so that prompts with a common prefix get a common prefix again)."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pdctl.bench import Asked
from pdctl.bench.workload import Vocabulary, joined, read_lines, refuse_broken

_MOONCAKE_BLOCK = 512
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Scale:
    """How to scale a trace. `speed`: replay speed (2 = twice as fast); `length`: factor for all lengths; `count`:
    maximum number of requests, 0 for all; `skip`: requests to skip at the start; `longest`: limit of prompt plus answer
    tokens, 0 for none."""

    speed: float = 1.0
    length: float = 1.0
    count: int = 0
    skip: int = 0
    longest: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A request of a trace. `at`: seconds, from any moment on; `inputs` and `outputs`: tokens."""

    at: float
    inputs: int
    outputs: int
    hashes: tuple[int, ...] = ()


def read_trace(path: Path, scale: Scale, words: Vocabulary, seed: int) -> list[Asked]:
    """Read a trace; the format is detected from the content. Raises PdctlError that lists malformed lines."""
    rows = read_rows(path)
    chosen = rows[scale.skip :][: scale.count or None]
    start = chosen[0].at if chosen else 0.0
    return [_asked(row, start, scale, words, _rng(f"{seed}/{n}")) for n, row in enumerate(chosen)]


def read_rows(path: Path) -> list[Row]:
    """The requests of a trace as they are, in its order. Raises PdctlError that lists malformed lines."""
    lines = read_lines(path)
    return _mooncake(path, lines) if lines and lines[0].lstrip().startswith("{") else _azure(path, lines)


def _rng(name: int | str) -> random.Random:
    return random.Random(name)  # noqa: S311 - the same each time


def _asked(row: Row, start: float, scale: Scale, words: Vocabulary, rng: random.Random) -> Asked:
    inputs, outputs = max(1, round(row.inputs * scale.length)), max(1, round(row.outputs * scale.length))
    if scale.longest:
        outputs = min(outputs, max(1, scale.longest // 2))
        inputs = max(1, min(inputs, scale.longest - outputs))
    prompt = _of_blocks(row, inputs, scale, words) if row.hashes else words.prompt(inputs, rng)
    return Asked(prompt, outputs, (row.at - start) / scale.speed)


def _of_blocks(row: Row, inputs: int, scale: Scale, words: Vocabulary) -> list[int] | str:
    """Build a prompt from its blocks: the same hash always gives the same tokens."""
    size = max(1, round(_MOONCAKE_BLOCK * scale.length))
    prompt: list[int] | str | None = None
    left = inputs
    for name in row.hashes:
        block = words.prompt(min(size, left), _rng(name))
        prompt = block if prompt is None else joined(prompt, block)
        left -= size
        if left <= 0:
            break
    assert prompt is not None
    return prompt


def _azure(path: Path, lines: list[str]) -> list[Row]:
    found, broken = [], []
    for number, fields in enumerate(csv.reader(lines), 1):
        if number == 1 and tuple(fields) == _AZURE:
            continue
        try:
            when, inputs, outputs = fields
            # Azure writes seven decimals of a second; Python reads six.
            at = datetime.fromisoformat(when[:26]).timestamp()
            found.append(_row(at, int(inputs), int(outputs)))
        except ValueError:
            broken.append(number)
    refuse_broken(path, broken, f"each line must be {','.join(_AZURE)}, or a JSON object as in Mooncake traces")
    return found


def _mooncake(path: Path, lines: list[str]) -> list[Row]:
    found, broken = [], []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            hashes = tuple(int(name) for name in entry["hash_ids"])
            found.append(
                _row(entry["timestamp"] / 1000, int(entry["input_length"]), int(entry["output_length"]), hashes)
            )
        except (ValueError, KeyError, TypeError):
            broken.append(number)
    hint = 'each line must be like {"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [0]}'
    refuse_broken(path, broken, hint)
    return found


def _row(at: float, inputs: int, outputs: int, hashes: tuple[int, ...] = ()) -> Row:
    if inputs < 1 or outputs < 0:
        raise ValueError("negative lengths")
    return Row(at, inputs, max(1, outputs), hashes)
