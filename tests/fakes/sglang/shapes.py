"""The JSON of SGLang's answers, as its server writes it."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

Json = dict[str, Any]


def dump(found: Json) -> bytes:
    """Compact, as SGLang encodes."""
    return json.dumps(found, separators=(",", ":")).encode()


def event(**fields: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(fields) + b"\n\n"


def error(message: str, status: int = 400, kind: str = "BadRequestError") -> JSONResponse:
    """SGLang's error answer: the object itself is the body."""
    return JSONResponse(_error(message, status, kind), status)


def error_event(message: str, status: int) -> bytes:
    """An error in a stream, which began with status 200."""
    return event(error=_error(message, status, "INTERNAL_SERVER_ERROR"))


def _error(message: str, status: int, kind: str) -> Json:
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def usage(prompt: int, tokens: int) -> Json:
    """Token counts."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens,
            "prompt_tokens_details": None, "reasoning_tokens": 0, "completion_tokens_details": None}  # fmt: skip


class Shapes:
    """The events of one request. `body`: the request."""

    def __init__(self, body: Json, chat: bool, prompt: list[int]) -> None:
        options = body.get("stream_options") or {}
        self.chat, self.prompt = chat, prompt
        self.counts_each, self.counts = bool(options.get("continuous_usage_stats")), bool(options.get("include_usage"))
        self.ids = bool(body.get("return_token_ids")) and not chat
        self.head: Json = {"id": body.get("rid") or "none", "created": 1, "model": body.get("model") or "default"}
        self.head["object"] = "chat.completion.chunk" if chat else "text_completion"

    def begin(self) -> bytes:
        """A chat begins with its role."""
        delta = {"reasoning_content": None, "role": "assistant", "content": ""}
        return self._chat_event(delta, None) if self.chat else b""

    def token(self, token: int, count: int, reason: str | None) -> bytes:
        """One token; `count`: tokens so far."""
        if self.chat:
            # SGLang's reasoning parser: here the first tokens are thoughts if the prompt says so.
            thinks = b"think" in bytes(self.prompt) and count <= 3
            name = "reasoning_content" if thinks else "content"
            sent = self._chat_event({"reasoning_content": None, name: chr(token)}, None, count)
            return sent + (self._chat_event({"reasoning_content": None}, reason) if reason else b"")
        choice: Json = {"index": 0, "text": chr(token), "logprobs": None, "finish_reason": reason, "matched_stop": None}
        if self.ids:
            choice["token_ids"] = [token]
            if count == 1:
                choice["prompt_token_ids"] = self.prompt
        return event(**self.head, choices=[choice], usage=usage(len(self.prompt), count) if self.counts_each else None)

    def _chat_event(self, delta: Json, reason: str | None, count: int = 0) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, "matched_stop": None}
        counted = {"usage": usage(len(self.prompt), count)} if self.counts_each and count else {}
        return event(**self.head, choices=[choice], **counted)

    def end(self, count: int) -> bytes:
        """The counts, and the end of the stream."""
        counts = event(**self.head, choices=[], usage=usage(len(self.prompt), count)) if self.counts else b""
        return counts + b"data: [DONE]\n\n"

    def whole(self, tokens: list[int], reason: str) -> JSONResponse:
        """An answer in one piece."""
        text = "".join(map(chr, tokens))
        part: Json = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice: Json = {"index": 0, **part, "logprobs": None, "finish_reason": reason, "matched_stop": None}
        if self.ids:
            choice |= {"token_ids": tokens, "prompt_token_ids": self.prompt}
        head = {**self.head, "object": "chat.completion" if self.chat else "text_completion"}
        counts = usage(len(self.prompt), len(tokens))
        return JSONResponse({**head, "choices": [choice], "usage": counts, "metadata": None})
