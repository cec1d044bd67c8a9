"""Bodies and bytes that no client library sends: each is answered in OpenAI's format, or the connection is closed."""

from __future__ import annotations

import gzip
import json
import random
import socket
import time
from urllib.parse import urlsplit

import httpx

from tests.service import Service

_PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
_GOOD: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2, "temperature": 0.5, "seed": 1, "stream": True, "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": False},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1, 2]},
}
_FIELDS = (
    "prompt", "messages", "tokens", "model", "stream", "stream_options", "n", "best_of", "seed", "stop", "logprobs",
    "top_logprobs", "echo", "prompt_logprobs", "bad_words", "logit_bias", "response_format", "structured_outputs",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "tools", "tool_choice", "chat_template_kwargs",
    "continue_final_message", "add_generation_prompt", "truncate_prompt_tokens", "min_tokens", "max_tokens", "priority",
    "max_completion_tokens", "stop_token_ids", "allowed_token_ids", "temperature", "top_p", "top_k", "min_p", "user",
    "kv_transfer_params", "resume_token_ids", "return_token_ids", "metadata", "reasoning_effort", "nonsense",
)  # fmt: skip
_VALUES = (
    "null", "true", "0", "-1", "1", "2", "1.5", "5.0", "1e308", "-1e308", "1e999", "9" * 40, "9" * 400, '""', '"x"',
    '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', "[]", "[[]]", "[1]", "[1.0, 2]", '["x"]', "[null]", '[["x"]]', "{}",
    '{"type": "json_object"}', '{"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}',
    '{"json": {"type": "string", "maxLength": 3}}', '{"regex": "(a+)+$"}', '{"grammar": "root ::= root"}',
    '"root ::= "',
    '"(" ', '"[a-"', '{"include_usage": true}', '{"type": "function", "function": {"name": "f"}}',
    '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]', '[{"role": "user"}]',
    '[{"role": "user", "content": [{"type": "text", "text": "x"}]}]', '[{"role": "x", "content": 5}]', '{"5": 1e2}',
    '"' + "a" * 70_000 + '"', "[" * 60 + "]" * 60, "[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500, "NaN", "",
    "[" + "1," * 3000 + "1]", "[-1]", "[2147483647]", "[9999999999999999999999]", '"json_object"', '"{{ 7*7 }}"',
)  # fmt: skip
_ANSWER_S = 60.0


def walk(service: Service, seed: int, seconds: float) -> list[str]:
    """Returns findings: the sent bytes and the outcome."""
    chance = random.Random(seed)
    found: list[str] = []
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        count += 1
        if chance.random() < 0.75:
            sent, reason = _body(service, chance)
        else:
            sent, reason = _bytes(service, chance)
        if reason:
            found.append(f"{reason}\n  to {sent[:600]!r}")
    answer = service.complete("x", max_tokens=2)
    if len(answer["token_ids"]) != 2:
        found.append("afterwards a plain request is not answered")
    print(f"{count} requests")
    return found


def _body(service: Service, chance: random.Random) -> tuple[bytes, str]:
    path = chance.choice(_PATHS)
    body = _encoded(chance, path)
    headers = {"content-type": "application/json"}
    if chance.random() < 0.1:
        headers["content-encoding"] = chance.choice(("gzip", "deflate", "br", "identity", ""))
        body = gzip.compress(body) if chance.random() < 0.5 else body
    sent = f"{path} {headers.get('content-encoding')}: ".encode() + body
    try:
        answer = service.client.post(path, content=body, headers=headers, timeout=_ANSWER_S)
    except httpx.HTTPError as failure:
        return sent, f"no answer: {type(failure).__name__} {failure}"
    return sent, _wrong(answer.status_code, answer.text)


def _encoded(chance: random.Random, path: str) -> bytes:
    """A valid body with some fields changed, written by hand because JSON libraries follow the rules."""
    fields = [(name, json.dumps(value)) for name, value in _GOOD[path].items()]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        new = (chance.choice(_FIELDS), chance.choice(_VALUES))
        if chance.random() < 0.7:
            fields = [field for field in fields if field[0] != new[0]]
        fields.append(new)
    chance.shuffle(fields)
    body = ("{" + ", ".join(f'"{name}": {value}' for name, value in fields) + "}").encode()
    if chance.random() < 0.15:
        cut = chance.randrange(len(body) + 1)
        body = body[:cut] + bytes([chance.randrange(256)]) + body[cut + chance.randrange(3) :]
    return body[: chance.randrange(len(body))] if chance.random() < 0.05 else body


def _wrong(status: int, text: str) -> str:
    """What is wrong with an answer; "" if nothing."""
    if status >= 500 or status < 200:
        return f"status {status}: {text[:300]}"
    if status >= 400:
        try:
            error = json.loads(text)["error"]
            return "" if error["message"] and error["code"] == status else f"an odd error: {text[:300]}"
        except (ValueError, KeyError, TypeError):
            return f"status {status} outside the error shape: {text[:300]}"
    for line in text.splitlines() if text.startswith("data: ") else ():
        if line.startswith("data: {") and "error" in json.loads(line[6:]):
            return f"a stream with an error: {line[:300]}"
    return ""


_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
_GOOD_BODY = b'{"prompt": "x", "max_tokens": 2}'


def _bytes(service: Service, chance: random.Random) -> tuple[bytes, str]:
    """A request with changed bytes, sent in pieces, with or without closing the sending side."""
    data = _HEAD + b"content-length: %d\r\n\r\n" % len(_GOOD_BODY) + _GOOD_BODY
    if chance.random() < 0.3:
        data = _HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(_GOOD_BODY), _GOOD_BODY)
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[at + chance.randrange(20) :]
            case 2:
                data = data[:at] + chance.choice((b"\r\n", b"\n", b"\x00", b": ", b"x" * 70_000)) + data[at:]
            case 3:
                data = data * 2
            case _:
                data = data.replace(b"\r\n", b"\n") if chance.random() < 0.5 else data[:at]
    return data, _exchanged(service, data, chance)


def _exchanged(service: Service, data: bytes, chance: random.Random) -> str:
    url = urlsplit(service.url)
    got = b""
    with socket.create_connection((url.hostname, url.port), timeout=_ANSWER_S) as link:
        try:
            size = chance.choice((1, 7, 100, 10**6)) if len(data) < 2000 else 10**6
            for start in range(0, len(data), size):
                link.sendall(data[start : start + size])
            # An incomplete request is not waited for: closing the sending side makes it complete or invalid.
            link.shutdown(socket.SHUT_WR)
            while more := link.recv(65536):
                got += more
        except TimeoutError:
            return f"neither an answer nor an end within {_ANSWER_S:g} s: {got[-200:]!r}"
        except OSError:
            pass  # it was refused before it was complete
    for part in got.split(b"HTTP/1.1 ")[1:]:
        status = int(part[:3])
        if status >= 500:
            return f"status {status}: {part[:300]!r}"
    if got and not got.startswith(b"HTTP/1.1 "):
        return f"what came is no HTTP: {got[:200]!r}"
    return ""
