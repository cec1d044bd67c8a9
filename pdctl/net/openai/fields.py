"""The request fields that the builtin engine knows: OpenAI's and vLLM's.

The proxy uses only the names: a field that no engine in its pool knows is dropped with a warning, or refused.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdctl.wire import Port


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage` adds a last chunk with token counts; `continuous_usage_stats` adds the counts so far to every
    chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class OfferTo(msgspec.Struct, frozen=True):
    """The decode engine that may read the first chunks while the rest is computed."""

    host: str
    port: Port


class HoldRequest(msgspec.Struct):
    """`kv_transfer_params` sent to a prefill engine: vLLM's fields plus `offer_to`."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    offer_to: OfferTo | None = None


class Structured(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: exactly one field is set."""

    json: dict[str, object] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class RequestSlo(msgspec.Struct, forbid_unknown_fields=True):
    """The targets of one request: `ttft_ms`, milliseconds until its first token, and `tpot_ms`, for each later one."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


class MigrationRequest(msgspec.Struct, frozen=True):
    """LMDeploy's `migration_request`, sent to a decode engine: `remote_engine_id` is the prefill engine's URL."""

    remote_engine_id: str
    remote_session_id: int
    remote_token_id: int = 0
    remote_block_ids: list[int] = []
    protocol: int = 0
    is_dummy_prefill: bool = False


class _FromRouters(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that other routers add to the requests they forward. This service's proxy takes none of them from clients.

    The engine ignores `stream_reasoning`, because it streams all of a stream, and `session_id`; LMDeploy's other fields
    must have a value without effect, except for the last three.
    """

    # vllm-router. Clients may send include_reasoning for a chat.
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    include_reasoning: bool | None = None
    # LMDeploy's proxy.
    session_id: int | None = None
    repetition_ngram_size: int | None = None
    repetition_ngram_threshold: int | None = None
    min_new_tokens: int | None = None
    enable_thinking: bool | None = None
    return_logprob: bool | None = None
    return_routed_experts: bool | None = None
    media_io_kwargs: dict[str, object] | None = None
    mm_processor_kwargs: dict[str, object] | None = None
    input_ids: list[int] | None = None
    image_data: msgspec.Raw = msgspec.Raw(b"null")
    with_cache: bool | None = None
    preserve_cache: bool | None = None
    migration_request: MigrationRequest | None = None


class _Common(_FromRouters, kw_only=True):
    """The fields shared by completions and chat completions."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    resume_token_ids: list[int] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    priority: int | None = None
    slo: RequestSlo | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, object] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    verbosity: str | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    # Clients may send these too.
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    return_hidden_states: bool | None = None
    spaces_between_special_tokens: bool | None = None

    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, object] | None = None
    # vLLM's fields.
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    echo: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: Structured | None = None
    guided_json: dict[str, object] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionBody(_Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    max_tokens: int | None = None
    # OpenAI has it for chats only; LMDeploy's proxy forwards it.
    max_completion_tokens: int | None = None
    best_of: int | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatBody(_Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, object]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    # OpenAI's that are refused: calls in an older form, audio, web search, predicted output, moderation.
    function_call: str | dict[str, object] | None = None
    functions: list[dict[str, object]] | None = None
    audio: dict[str, object] | None = None
    web_search_options: dict[str, object] | None = None
    prediction: dict[str, object] | None = None
    moderation: msgspec.Raw = msgspec.Raw(b"null")
    chat_template_kwargs: dict[str, object] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


def is_lmdeploys(body: CompletionBody | ChatBody) -> bool:
    """Whether LMDeploy's proxy sent it, as a prefill or as a decode."""
    return bool(body.preserve_cache) or body.migration_request is not None


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /tokenize: a prompt, or a chat's messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, object]] | None = None
    add_special_tokens: bool | None = None
    tools: list[dict[str, object]] | None = None
    chat_template_kwargs: dict[str, object] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
    model: str | None = None


_NOT_FROM_CLIENTS: dict[str, frozenset[str]] = {
    "/v1/completions": frozenset(_FromRouters.__struct_fields__) | {"max_completion_tokens"},
    "/v1/chat/completions": frozenset(_FromRouters.__struct_fields__) - {"include_reasoning"},
}

KNOWN_FIELDS: dict[str, frozenset[str]] = {
    path: frozenset(body.__struct_fields__) - _NOT_FROM_CLIENTS.get(path, frozenset())
    for path, body in (
        ("/v1/completions", CompletionBody),
        ("/v1/chat/completions", ChatBody),
        ("/tokenize", TokenizeBody),
        ("/detokenize", DetokenizeBody),
    )
}
