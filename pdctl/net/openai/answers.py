"""What engines of every OpenAI-compatible kind answer: choices, counts, errors. Parsing without I/O."""

from __future__ import annotations

import msgspec

from pdctl.net.openai.api import Counts

# A choice's fields, each as JSON that is passed on as it is.
Choice = dict[str, msgspec.Raw]


class EngineError(Exception):
    """An engine refused or failed a call. `status` is HTTP's; `kv_lost` asks for a new prefill."""

    def __init__(self, status: int, message: str, kind: str, kv_lost: bool = False, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.kv_lost = kv_lost
        self.param = param


class KnownChoice(msgspec.Struct):
    """The fields of a choice that the proxy reads."""

    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None

    @property
    def counts(self) -> Counts:
        """The same as Counts."""
        prompt, completion = self.prompt_tokens_details, self.completion_tokens_details
        cached, reasoning = prompt and prompt.cached_tokens, completion and completion.reasoning_tokens
        return Counts(self.prompt_tokens, self.completion_tokens, cached or 0, reasoning or 0)


class ErrorBody(msgspec.Struct):
    """OpenAI's error object."""

    message: str = "the engine failed without a message"
    type: str = "server_error"
    param: str | None = None


class Answer(msgspec.Struct):
    """A whole answer, or one event of a stream."""

    choices: list[msgspec.Raw] = []
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorBody | None = None

    @property
    def counts(self) -> Counts | None:
        """The token counts, where the answer has them."""
        return self.usage.counts if self.usage else None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose KV was there already, if the engine tells them."""
        return self.usage.counts.cached if self.usage else 0

    @property
    def prompt_tokens(self) -> int:
        """0 where the answer does not count them."""
        return self.usage.prompt_tokens if self.usage else 0


_decode_answer = msgspec.json.Decoder(Answer).decode
_decode_known = msgspec.json.Decoder(KnownChoice).decode
_decode_fields = msgspec.json.Decoder(Choice).decode


def parse_answer(status: int, body: bytes) -> Answer:
    """A whole answer or an event's data. Raises EngineError for an error, and for what is not an answer."""
    try:
        answer = _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise EngineError(502, f"the engine's answer is malformed: {failure}", "bad_upstream") from None
    if status >= 400 or answer.error:
        error = answer.error or ErrorBody()
        code = status if status >= 400 else 500
        raise EngineError(code, error.message, error.type, error.type == "kv_lost", error.param)
    return answer


def refusal(status: int, body: bytes) -> EngineError:
    """What an answer with a status other than 200 says."""
    try:
        parse_answer(status, body)
    except EngineError as failure:
        return failure
    return EngineError(status if status >= 400 else 502, f"the engine answered with status {status}", "server_error")


def first_choice(answer: Answer) -> tuple[KnownChoice, Choice] | None:
    """The first choice as the proxy reads it and as clients get it; None where there is none."""
    if not answer.choices:
        return None
    return _decode_known(answer.choices[0]), _decode_fields(answer.choices[0])


def whole_counts(body: bytes) -> Counts:
    """The token counts of an answer in one piece. Raises EngineError when it is not one."""
    answer = parse_answer(200, body)
    if not answer.choices or answer.counts is None:
        raise EngineError(502, "the engine answered without choices or usage", "bad_upstream")
    return answer.counts


def shown(choice: Choice, *hidden: str) -> Choice:
    """A choice as clients see it: without its index, which the proxy gives, and without the `hidden` fields."""
    return {name: value for name, value in choice.items() if name not in ("index", *hidden)}
