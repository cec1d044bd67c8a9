"""What the journal says of a streamed answer beside its bytes, and how it is read after a death. Pure.

Facts are noted once, at the beginning of the answer. Notes follow with each part: items that end with a comma. An item
is a token id, or `L2`: what follows is of leg 2; `P10:4`: the leg has begun, its prompt has 10 tokens, 4 of them from a
cache; `F`: the leg is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec


class Facts(msgspec.Struct, frozen=True):
    """What every part of an answer repeats, and what it depends on. `closes`: the connection ends with the answer;
    `legs`: choices; `fingerprint`: of the version that began; `is_exact`: another proxy can continue it exactly."""

    request_id: str
    created: int
    seed: int
    legs: int = 1
    closes: bool = False
    fingerprint: str = ""
    is_exact: bool = True


@dataclass(slots=True)
class Progress:
    """What the client has, or is about to get, of one choice."""

    begun: bool = False
    finished: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Resumed:
    """An answer that another proxy began."""

    facts: Facts
    legs: list[Progress]


encode_facts = msgspec.json.Encoder().encode
_decode_facts = msgspec.json.Decoder(Facts).decode


def begun(leg: int, alone: bool, prompt_tokens: int, cached_tokens: int) -> bytes:
    """The notes before the first part of a leg."""
    return _leg(leg, alone) + b"P%d:%d," % (prompt_tokens, cached_tokens)


def tokens(leg: int, alone: bool, token_ids: list[int], finished: bool) -> bytes:
    """The notes of one part of a leg."""
    items = _leg(leg, alone) + b"".join(b"%d," % token for token in token_ids)
    return items + b"F," if finished else items


def _leg(leg: int, alone: bool) -> bytes:
    return b"" if alone else b"L%d," % leg


def read(facts: bytes, notes: bytes) -> Resumed:
    """Raises ValueError if they are not what this version writes."""
    try:
        known = _decode_facts(facts)
    except msgspec.DecodeError as failure:
        raise ValueError(f"the facts of an answer cannot be read: {failure}") from failure
    legs = [Progress() for _ in range(known.legs)]
    leg = legs[0]
    if notes and not notes.endswith(b","):
        raise ValueError("the notes of an answer end in the middle")
    for item in notes.split(b",")[:-1]:
        kind = item[:1]
        if kind == b"L":
            number = int(item[1:])
            if not 0 <= number < len(legs):
                raise ValueError(f"an answer of {len(legs)} choices has no choice {number}")
            leg = legs[number]
        elif kind == b"P":
            prompt, _, cached = item[1:].partition(b":")
            leg.begun, leg.prompt_tokens, leg.cached_tokens = True, int(prompt), int(cached)
        elif kind == b"F":
            leg.finished = True
        else:
            leg.token_ids.append(int(item))
    return Resumed(known, legs)
