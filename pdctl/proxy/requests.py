"""What the proxy reads of a client's request. It has no tokenizer and leaves the rest to the engines."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgspec

from pdctl.openai_api import ApiError, Envelope, field_of

_INTERNAL = ("kv_transfer_params", "resume_token_ids")

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False


class _Known(msgspec.Struct):
    """The fields that change what the proxy does."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    return_token_ids: bool | None = None


_decode_known = msgspec.json.Decoder(_Known).decode


@dataclass(slots=True)
class ClientRequest:
    """A request to relay. `fields` goes to engines as it came; `size` is the body's length in bytes."""

    envelope: Envelope
    fields: dict[str, object]
    size: int
    path: str
    stream: bool
    include_usage: bool
    max_tokens: int | None


def parse(body: bytes, path: str, chat: bool, request_id: str, served_model: str) -> ClientRequest:
    """Raises ApiError for what no engine needs to be asked about."""
    try:
        known = _decode_known(body)
        fields: dict[str, object] = dict(_decode_fields(body))
    except msgspec.ValidationError as failure:
        raise ApiError(400, str(failure), param=field_of(failure)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise ApiError(400, f"the body is not valid JSON: {failure}") from None
    for name in _INTERNAL:
        if name in fields:
            raise ApiError(400, f"{name} is for this service's own processes", param=name)
    if known.model not in (None, served_model):
        message = f"the model {known.model!r} does not exist; this service serves {served_model!r}"
        raise ApiError(404, message, param="model")
    if known.stream_options is not None and not known.stream:
        raise ApiError(400, "stream_options is for streams: set stream to true", param="stream_options")
    if known.seed is None:
        # Drawn here, so that every engine this request ever visits draws the same tokens.
        fields["seed"] = secrets.randbits(62)
    for name in ("stream", "stream_options", "return_token_ids"):
        fields.pop(name, None)
    return ClientRequest(
        envelope=Envelope(request_id, chat, served_model, bool(known.return_token_ids)),
        fields=fields,
        size=len(body),
        path=path,
        stream=bool(known.stream),
        include_usage=bool(known.stream_options and known.stream_options.include_usage),
        max_tokens=known.max_completion_tokens or known.max_tokens,
    )
