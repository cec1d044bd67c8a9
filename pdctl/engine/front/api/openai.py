"""OpenAI requests, checked before anything is computed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace

import msgspec

from pdctl.engine.front.api.guided import grammar_of
from pdctl.engine.front.api.parsers.tool_calls import ToolFormat
from pdctl.engine.front.api.targets import MOST_MS
from pdctl.engine.front.routers.transfers import Router
from pdctl.engine.front.spans import NOT_RECORDED, AnswerSpan
from pdctl.engine.ipc.messages import Sampling
from pdctl.net.openai.api import ApiError, Envelope, decode_request, shown_number
from pdctl.net.openai.fields import ChatBody, CompletionBody, MigrationRequest, OfferTo, TokenizeBody
from pdctl.net.prefixes.beginnings import Beginning
from pdctl.wire import HandOver

_MAX_STOPS = 16
# Limits, because each new token is checked against all stop strings.
_MAX_STOP_TEXT = 8192
_MAX_BIASES = 1024
_MAX_BAD_WORDS = 128


_decode_completion = msgspec.json.Decoder(CompletionBody).decode
_decode_chat = msgspec.json.Decoder(ChatBody).decode

_NULL = msgspec.Raw(b"null")
# The words of fields that have some.
_WORDS: dict[str, tuple[str, ...]] = {
    "verbosity": ("low", "medium", "high"),
    "reasoning_effort": ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "prompt_cache_retention": ("in_memory", "in-memory", "24h"),
}
# Fields that change the output but are not supported: any other value is refused, never ignored. The proxy splits
# requests for several answers.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "functions": (None, []),
    "audio": (None,),
    "web_search_options": (None,),
    "prediction": (None,),
    "moderation": (None, _NULL),
    "suffix": (None, ""),
    "skip_special_tokens": (None, True),
    "no_stop_trim": (None, False),
    "return_hidden_states": (None, False),
    "modalities": (None, ["text"]),
    "function_call": (None, "none"),
    # LMDeploy's.
    "repetition_ngram_size": (None, 0),
    "min_new_tokens": (None, 0),
    "enable_thinking": (None,),
    "return_logprob": (None, False),
    "return_routed_experts": (None, False),
    "media_io_kwargs": (None,),
    "mm_processor_kwargs": (None,),
    "input_ids": (None,),
    "image_data": (_NULL,),
}


@dataclass(slots=True)
class GenerationRequest:
    """One checked request. `token_ids` is the prompt; `resume` are output tokens that the client already has.

    `priority`: lower goes first; `ttft_s`, `tpot_s`: targets for the first token and the later ones, 0 for none.
    `salt`: requests with different salts share no KV; `cached`: tokens of the prompt whose KV was there already;
    `reasoning`: tokens of the output so far that are reasoning.
    `echo`: text before the answer; `counts_each`: each event of the stream carries the counts so far;
    `shows_prompt_logprobs`: vLLM's prompt_logprobs.
    `tools`: for the parser of free calls; `one_call`: further calls are left out; `splits_reasoning`: reasoning is
    apart from the text; `shows_reasoning`: the client wants it.
    `router`: of which kind the caller is, and `holder` its name as the holder of the lease; `migration`: leads to the
    hand-over, if LMDeploy's proxy sent it.
    `beginning`: the names that a proxy gives to the prompt's first pieces.
    `stages`: seconds of its hand-over so far, by phase, for x-pdctl-timing; `span`: where they are recorded.
    """

    request_id: str
    envelope: Envelope
    token_ids: list[int]
    sampling: Sampling
    stops: list[str]
    stream: bool
    include_usage: bool
    resume: list[int]
    hold: bool
    hand_over: HandOver | None
    offer_to: OfferTo | None = None
    include_stop: bool = False
    holder: str = Router.OURS.value
    attempt: str = ""
    logprobs: int = -1
    tool_calls: ToolFormat = ToolFormat.NONE
    tools: list[dict[str, object]] | None = None
    one_call: bool = False
    splits_reasoning: bool = False
    shows_reasoning: bool = True
    tenant: str = ""
    priority: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    salt: str = ""
    cached: int = 0
    reasoning: int = 0
    echo: str = ""
    counts_each: bool = False
    shows_prompt_logprobs: bool = False
    router: Router = Router.OURS
    migration: MigrationRequest | None = None
    beginning: Beginning | None = None
    stages: dict[str, float] = field(default_factory=dict)
    span: AnswerSpan = NOT_RECORDED

    @property
    def what(self) -> str:
        """The part of an answer that is computed here."""
        return "prefill" if self.hold else "generate" if self.hand_over is None else "decode"


def only_for_kv(request: GenerationRequest) -> GenerationRequest:
    """The prefill of another project's router. Only its KV is used, because decode samples the first token again: so no
    grammar is compiled for it, and its output does not end before there is KV to keep."""
    sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    return replace(request, sampling=sampling, stops=[], echo="", logprobs=-1, tool_calls=ToolFormat.NONE)


def parse_body(body: bytes, chat: bool) -> CompletionBody | ChatBody:
    """Decode a body and make all checks that need no tokenizer. Raises ApiError."""
    parsed: CompletionBody | ChatBody
    parsed = decode_request(_decode_chat, body) if chat else decode_request(_decode_completion, body)
    for name, neutral in _NEUTRAL.items():
        value = getattr(parsed, name, None)
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral):
            raise ApiError(400, f"{name} is not supported by this engine", param=name)
    for name, words in _WORDS.items():
        if getattr(parsed, name) not in (None, *words):
            raise ApiError(400, f"{name} must be one of: {', '.join(words)}", param=name)
    _check_numbers(parsed)
    return parsed


def _check_numbers(body: CompletionBody | ChatBody) -> None:
    checks: list[tuple[str, float | None, float, float]] = [
        ("temperature", body.temperature, 0.0, 100.0),
        ("top_p", body.top_p, 5e-324, 1.0),
        ("top_k", body.top_k, -1, 2**31),
        ("max_tokens", body.max_tokens, 1, 2**31),
        ("max_completion_tokens", getattr(body, "max_completion_tokens", None), 1, 2**31),
        ("seed", body.seed, -(2**63), 2**63 - 1),
        ("presence_penalty", body.presence_penalty, -2, 2),
        ("frequency_penalty", body.frequency_penalty, -2, 2),
        ("repetition_penalty", body.repetition_penalty, 1e-3, 100),
        ("min_p", body.min_p, 0, 1),
        ("min_tokens", body.min_tokens, 0, 2**31),
        ("top_logprobs", getattr(body, "top_logprobs", None), 0, 20),
        ("logprobs", body.logprobs if isinstance(body, CompletionBody) else None, 0, 20),
        ("prompt_logprobs", body.prompt_logprobs, 0, 20),
        ("truncate_prompt_tokens", body.truncate_prompt_tokens, -1, 2**31),
        ("priority", body.priority, -(2**31), 2**31),
        ("slo.ttft_ms", body.slo.ttft_ms if body.slo else None, 1, MOST_MS),
        ("slo.tpot_ms", body.slo.tpot_ms if body.slo else None, 1, MOST_MS),
    ]
    for name, value, low, high in checks:
        if value is not None and not low <= value <= high:
            bounds = f"from {_bound(low)} to {_bound(high)}"
            raise ApiError(400, f"{name} must be {bounds}; it is {shown_number(value)}", param=name)


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def template_variables(body: ChatBody | TokenizeBody) -> dict[str, object]:
    """The variables of a chat template besides messages and tools. Raises ApiError."""
    found = {**(body.chat_template_kwargs or {})}
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        found.setdefault("reasoning_effort", body.reasoning_effort)
        # As in vLLM: templates such as Qwen3's know only whether to think.
        found.setdefault("enable_thinking", body.reasoning_effort != "none")
    if isinstance(body, ChatBody) and body.verbosity is not None:
        found.setdefault("verbosity", body.verbosity)
    if body.continue_final_message and body.add_generation_prompt:
        message = "continue_final_message continues the last message: add_generation_prompt must be false"
        raise ApiError(400, message, param="add_generation_prompt")
    if body.continue_final_message or body.add_generation_prompt is not None:
        found["add_generation_prompt"] = bool(body.add_generation_prompt)
    return found


def stop_strings(body: CompletionBody | ChatBody) -> list[str]:
    """The stop strings as a list. Raises ApiError."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > _MAX_STOPS or not all(stops) or sum(map(len, stops)) > _MAX_STOP_TEXT:
        message = f"stop takes up to {_MAX_STOPS} strings, none of them empty, {_MAX_STOP_TEXT} characters together"
        raise ApiError(400, message, param="stop")
    return stops


def bad_words(body: CompletionBody | ChatBody) -> list[str]:
    """Words that the output must not contain. Raises ApiError."""
    words = body.bad_words or []
    if len(words) > _MAX_BAD_WORDS or not all(map(str.strip, words)) or sum(map(len, words)) > _MAX_STOP_TEXT:
        message = f"bad_words takes up to {_MAX_BAD_WORDS} words, none empty, {_MAX_STOP_TEXT} characters together"
        raise ApiError(400, message, param="bad_words")
    return words


def prompt_logprobs(body: CompletionBody | ChatBody) -> int:
    """Number of most likely tokens to report with each prompt token; -1 for no log probabilities of the prompt."""
    if body.prompt_logprobs is not None:
        return body.prompt_logprobs
    if isinstance(body, CompletionBody) and body.echo and body.logprobs is not None:
        return body.logprobs
    return -1


def sampling_of(
    body: CompletionBody | ChatBody,
    prompt_len: int,
    max_model_len: int,
    vocab_size: int,
    forbidden: list[list[int]] | None = None,
) -> Sampling:
    """Sampling with OpenAI's defaults; `forbidden`: the bad words' token ids.

    Raises ApiError if prompt and output do not fit into the context.
    """
    wanted = _max_tokens(body, prompt_len, max_model_len)
    if body.min_tokens is not None and body.min_tokens > wanted:
        raise ApiError(400, f"min_tokens = {body.min_tokens} is more than max_tokens = {wanted}", param="min_tokens")
    return Sampling(
        max_tokens=wanted,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        ignore_eos=bool(body.ignore_eos),
        min_p=body.min_p or 0.0,
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_biases(body.logit_bias or {}, vocab_size),
        logprobs=_logprobs(body),
        grammar=grammar_of(body),
        stop_token_ids=_token_ids(body.stop_token_ids, vocab_size, "stop_token_ids"),
        allowed_token_ids=_token_ids(body.allowed_token_ids, vocab_size, "allowed_token_ids"),
        bad_words=forbidden or [],
        # These are sent with the first token: a client that has a token already has them.
        prompt_logprobs=-1 if body.resume_token_ids else prompt_logprobs(body),
    )


def _max_tokens(body: CompletionBody | ChatBody, prompt_len: int, max_model_len: int) -> int:
    room = max_model_len - prompt_len
    if room < 1:
        raise ApiError(
            400,
            f"this model's context is {max_model_len} tokens, prompt and output together; the prompt alone has "
            f"{prompt_len}",
            param="messages" if isinstance(body, ChatBody) else "prompt",
        )
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted is None:
        wanted = room if isinstance(body, ChatBody) else min(16, room)
    if wanted > room:
        raise ApiError(
            400,
            f"this model's context is {max_model_len} tokens; {prompt_len} in the prompt and {wanted} asked for "
            f"make {prompt_len + wanted}",
            param="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
        )
    return int(wanted)


def _token_ids(given: list[int] | None, vocab_size: int, name: str) -> list[int]:
    if given is None:
        return []
    if not given or len(given) > vocab_size or not 0 <= min(given) <= max(given) < vocab_size:
        raise ApiError(400, f"{name} takes token ids from 0 to {vocab_size - 1}, at least one", param=name)
    return sorted(set(given))


def _logprobs(body: CompletionBody | ChatBody) -> int:
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else -1
    return -1 if body.logprobs is None else body.logprobs


def _biases(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    if len(given) > _MAX_BIASES:
        raise ApiError(400, f"logit_bias takes up to {_MAX_BIASES} tokens; it has {len(given)}", param="logit_bias")
    found = {}
    for word, bias in given.items():
        if not word.isdecimal() or len(word) > 10 or int(word) >= vocab_size or not -100 <= bias <= 100:
            message = f"logit_bias maps token ids from 0 to {vocab_size - 1} to numbers from -100 to 100"
            raise ApiError(400, message, param="logit_bias")
        found[int(word)] = bias
    return found
