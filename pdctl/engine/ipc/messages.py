"""Messages between front and core, as msgpack over two one-way sockets."""

from __future__ import annotations

import msgspec

from pdctl.latency import Work
from pdctl.wire import KvEndpoint, LinkInfo


class Thinking(msgspec.Struct, frozen=True, array_like=True):
    """Reasoning that may come before guided output, in token ids: after `begin`, or at once if it is `open`, up to
    `end`."""

    begin: int
    end: int
    open: bool


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How to choose tokens. Temperature 0 is greedy. `max_tokens` and `min_tokens` count resumed tokens as well.

    `logprobs`: number of most likely tokens to report with the chosen one; -1 for no report. `stop_token_ids` end the
    output like the model's own end token; if `allowed_token_ids` is set, only these are chosen. `grammar`: the grammar
    of the output, in the format of `pdctl.engine.model.grammar`; "" for none. `thinking`: the grammar applies after it;
    None: from the first token. `bad_words`: token sequences that the output must not contain. `prompt_logprobs`: as
    `logprobs`, for the prompt."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int = -1
    grammar: str = ""
    stop_token_ids: list[int] = []
    allowed_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    prompt_logprobs: int = -1
    thinking: Thinking | None = None

    @property
    def is_shaped(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
            or self.grammar
            or self.allowed_token_ids
            or self.bad_words
        )


# (token id, natural log of its probability): the chosen token first, then the most likely ones in order.
Logprobs = list[tuple[int, float]]


class PromptToken(msgspec.Struct, frozen=True, array_like=True):
    """A prompt token's rank under the model (1: the most likely), and log probabilities."""

    rank: int
    logprobs: Logprobs


# -- front to core -----------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A new request. `token_ids`: the prompt, then tokens that the client already has.

    `hold`: stop after one token and keep the KV for a decode engine; `offer`: report chunks as they are computed.
    `await_kv`: reserve blocks for the first `kv_tokens` tokens and wait until their KV has been pulled; an earlier
    Reserve with the same id becomes this request. `kv_segment`: see Manifest.segment, of the peer. `tenant`: the tenant
    for fair grammar compilation. `salt`: requests with different salts share no KV. `priority`: lower goes first;
    `ttft_s`, `tpot_s`: targets for the first token and the later ones, 0 for none.
    """

    request_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: Sampling
    hold: bool = False
    offer: bool = False
    await_kv: bool = False
    kv_tokens: int = 0
    tenant: str = ""
    salt: str = ""
    priority: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    kv_segment: int = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Abort a request in any state and free what it has."""

    request_id: str


class Poke(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Request for an answer, to check that the step loop is running."""


class Reserve(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Reserve blocks for `kv_tokens` tokens of a request that will follow. `token_ids` and `salt`: these tokens and the
    request's salt, as far as they are known. `only_now`: fail if there is no room at once."""

    request_id: str
    kv_tokens: int
    token_ids: list[int] = []
    salt: str = ""
    only_now: bool = False


class Connect(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Prepare to read from a peer."""

    peer: str
    epoch: str
    endpoint: KvEndpoint


class Pull(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Copy KV of tokens `first` to `first + count` from a peer's blocks into those reserved for `request_id`."""

    request_id: str
    peer: str
    epoch: str
    endpoint: KvEndpoint
    source_blocks: list[int]
    target_blocks: list[int]
    first: int
    count: int


class Start(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The pulled KV was committed: start decoding."""

    request_id: str


class Keep(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The pulled KV was committed: others may find it, and the request that it was pulled for ends. `kv_segment`: see
    Submit. `kv_tokens`: the tokens whose KV has come, if that is less than what was reserved."""

    request_id: str
    kv_segment: int = 0
    kv_tokens: int | None = None


class Look(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Ask what the tiers have of blocks that follow each other. The answer is Seen."""

    request_id: str
    names: list[bytes]


class Load(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Copy blocks from the tiers into those reserved for `request_id`, as many as come. The answer is Pulled."""

    request_id: str
    names: list[bytes]
    block_ids: list[int]


class Find(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Look for the KV of a prompt's first tokens. What is found is held for a peer, until Abort."""

    request_id: str
    token_ids: list[int]
    salt: str


class Move(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Hold a sequence that decodes, for another engine: `offer`: in a few tokens, and report the KV so far at once."""

    request_id: str
    offer: bool


class HandBack(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fail the prompts for peers that were not begun: this engine does not prefill for others any more."""


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Leave the step loop and exit."""


ToCore = (
    Submit | Abort | Poke | Reserve | Connect | Pull | Start | Keep | Look | Load | Find | Move | HandBack | Shutdown
)


# -- core to front -----------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is loaded and checked, and has computed a token.

    `attention`: its backend, and why. `graphs`: the decode steps that are CUDA graphs, or why none is; "" on a CPU."""

    endpoint: KvEndpoint
    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    vocab_size: int
    attention: str
    graphs: str


class StartRefused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The core cannot serve, and a restart would not help."""

    reason: str


class Broken(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step failed, and the core ends. A restart may help."""

    reason: str


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One new token; `finish_reason` "stop" or "length" with the last.

    `prompt_logprobs`: if requested, with the first new token, one entry per prompt token except the first.
    `cached`: tokens of the prompt whose KV was there already.
    """

    request_id: str
    token_id: int
    finish_reason: str | None
    logprobs: Logprobs | None = None
    prompt_logprobs: list[PromptToken] | None = None
    cached: int = 0


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A prefill is done, or a sequence is moved. Its blocks are kept until the front frees them with Abort. `cached`:
    see Token."""

    request_id: str
    token_id: int
    block_ids: list[int]
    num_tokens: int
    logprobs: Logprobs | None = None
    prompt_logprobs: list[PromptToken] | None = None
    cached: int = 0


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """KV of the first `num_computed` tokens of an offered sequence is computed. `num_tokens`: what will be handed over;
    0: the prompt."""

    request_id: str
    block_ids: list[int]
    num_computed: int
    num_tokens: int = 0


class Withdrawn(msgspec.Struct, frozen=True, array_like=True):
    """An offered sequence lost its blocks and starts over: what was read of it is invalid."""

    request_id: str


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """A request cannot be served by this engine; `elsewhere`: but by another one."""

    request_id: str
    reason: str
    elsewhere: bool = False


class TierBooks(msgspec.Struct, frozen=True, array_like=True):
    """Counts of blocks of a tier: those that it has now (`blocks`; 0 of a store), and since the start. See TierCounts;
    `dropped`: blocks that were not copied in time, or that it did not take."""

    name: str
    is_there: bool
    blocks: int
    stored: int
    refused: int
    loaded: int
    wrong: int
    dropped: int


class Books(msgspec.Struct, frozen=True, array_like=True):
    """The core's counts after a step. Free, referenced, leased and quarantined blocks add up to the pool; `reserved`
    blocks (for KV that is being pulled) are part of the referenced ones. `held_back`: prefills that wait for leased
    blocks to be freed. `blocks_idle`: free blocks that are kept for their content. `prefix_tokens` and `prefix_hits`:
    tokens of all prompts so far, and those whose KV was found. `prompts_own`: prompts computed here for answers from
    here; `prompts_received`: those whose KV came from a peer. `work`: see there; None before the first step. `drafted`
    and `accepted`: guessed tokens that were verified so far, and those that were right. `asked_ahead`: steps so far by
    whether the next one was scheduled while they computed (see `schedule.ahead`). `tiers`: where KV is kept beside the
    pool."""

    blocks_free: int = 0
    blocks_referenced: int = 0
    blocks_leased: int = 0
    blocks_quarantined: int = 0
    blocks_reserved: int = 0
    held_back: int = 0
    running: int = 0
    waiting: int = 0
    steps: int = 0
    blocks_idle: int = 0
    prefix_tokens: int = 0
    prefix_hits: int = 0
    prompts_own: int = 0
    prompts_received: int = 0
    work: Work | None = None
    drafted: int = 0
    accepted: int = 0
    asked_ahead: dict[str, int] = {}
    tiers: list[TierBooks] = []


class KvStored(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks that can be found by their names now, each after the one before it; the first one after `parent`.
    `tokens`: those of all these blocks, if they are told."""

    names: list[bytes]
    parent: bytes | None
    tokens: list[int]


class KvRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks that cannot be found by these names any more."""

    names: list[bytes]


KvChange = KvStored | KvRemoved


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The results of one step. `kv_changes`: of the prefix cache, in order. `offloaded`: names of blocks that came to,
    and went from, the engine's own memory beside its pool."""

    tokens: list[Token]
    held: list[Held]
    failed: list[Failed]
    books: Books
    progress: list[Progress] = []
    withdrawn: list[Withdrawn] = []
    kv_changes: list[KvChange] = []
    offloaded: tuple[list[bytes], list[bytes]] = ([], [])


class Reserved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks for a request's KV are reserved. The KV of its first `cached` tokens is already in them."""

    request_id: str
    block_ids: list[int]
    cached: int = 0


class Found(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The KV of the first `num_tokens` tokens is in these blocks, which are held; none: nothing was found, or too many
    blocks are held already."""

    request_id: str
    block_ids: list[int]
    num_tokens: int


class Seen(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What the tiers have: (how many of the first blocks, the predicted seconds to load them), rising."""

    request_id: str
    runs: list[tuple[int, float]]


class Pulled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A pull ended. `error`: empty if every byte was copied. `uncertain`: bytes may still arrive in its blocks.
    Also the end of a load: `blocks`: how many of those that were asked for are there now."""

    request_id: str
    error: str
    seconds: float
    bytes: int
    uncertain: bool = False
    blocks: int = 0


class Linked(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A peer is linked as described, or cannot be read from (`error`)."""

    link: LinkInfo


FromCore = Ready | StartRefused | Broken | StepDone | Reserved | Found | Seen | Pulled | Linked
