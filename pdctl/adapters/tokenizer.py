"""Asks an engine for the tokens of a prompt: the form that vLLM and SGLang share."""

from __future__ import annotations

import msgspec

from pdctl.adapters.dialect import Call, RequestState
from pdctl.net.openai.answers import EngineError

_encode = msgspec.json.Encoder().encode


class _Answer(msgspec.Struct):
    tokens: list[int]


_decode = msgspec.json.Decoder(_Answer).decode


def tokenize_call(state: RequestState, names: tuple[str, ...]) -> Call:
    """A call with these fields of the request, which decide about its prompt."""
    return Call("/tokenize", _encode({name: state.fields[name] for name in names if name in state.fields}))


def parse_tokens(body: bytes) -> list[int]:
    """The answer. Raises EngineError if it is none."""
    try:
        return _decode(body).tokens
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise EngineError(502, f"the engine's answer has no tokens: {failure}", "bad_upstream") from failure
