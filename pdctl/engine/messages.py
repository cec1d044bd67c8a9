"""What front and core say to each other, as msgpack over two one-way sockets."""

from __future__ import annotations

import msgspec

from pdctl.wire import PoolEndpoint


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How to choose tokens. Temperature 0 is greedy. `max_tokens` counts resumed tokens as well."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False


# -- front to core -----------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A new request. `token_ids` is the prompt, then tokens already given to the client.

    `hold`: stop after one token and keep the KV for a decode engine. `await_kv`: reserve blocks for the first
    `kv_tokens` tokens and wait until their KV has been pulled.
    """

    request_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: Sampling
    hold: bool = False
    await_kv: bool = False
    kv_tokens: int = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Forget a request in any state and free what it has."""

    request_id: str


class Pull(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Copy a peer's blocks into the blocks reserved for `request_id`."""

    request_id: str
    endpoint: PoolEndpoint
    source_blocks: list[int]
    target_blocks: list[int]


class Start(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The pulled KV was committed: decode."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Leave the step loop and exit."""


ToCore = Submit | Abort | Pull | Start | Shutdown


# -- core to front -----------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is loaded, checked and has computed a token."""

    endpoint: PoolEndpoint
    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    vocab_size: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The core cannot serve and a restart will not help."""

    reason: str


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One new token; `finish_reason` "stop" or "length" with the last."""

    request_id: str
    token_id: int
    finish_reason: str | None


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A prefill is done and its blocks are kept until the front frees them with Abort."""

    request_id: str
    token_id: int
    block_ids: list[int]
    num_tokens: int


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """A request cannot be served here at all."""

    request_id: str
    reason: str


class Books(msgspec.Struct, frozen=True, array_like=True):
    """The core's counts after a step."""

    blocks_free: int
    blocks_leased: int
    blocks_reserved: int
    running: int
    waiting: int
    steps: int


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What one step changed."""

    tokens: list[Token]
    held: list[Held]
    failed: list[Failed]
    books: Books


class Reserved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks for an awaited KV are set aside."""

    request_id: str
    block_ids: list[int]


class Pulled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A pull ended; `error` empty when every byte was copied."""

    request_id: str
    error: str
    seconds: float
    bytes: int


FromCore = Ready | Refused | StepDone | Reserved | Pulled
