"""The blocks of KV that can be found in one engine, by what its KV events say. Pure.

An engine's own names of blocks mean nothing to others: they depend on its hash function and its seed. So each block
also gets a name of ours, made of its tokens and of all before them, and the engine's is used only to recognize what it
removes. What cannot be named is left out, and then the index is not complete: "not there" may be wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import msgspec

from pdctl.kv_events import OWN_POOL, AllBlocksCleared, BlockHash, BlockRemoved, BlockStored

# Blocks of one engine: 2 million tokens in blocks of 16, 33 MiB. What comes beyond is not known.
_MOST_BLOCKS = 131_072
_NAME_BYTES = 8
# Where an engine finds KV by itself, as bits. SGLang has its own word for its memory of the host.
_MEDIA = {OWN_POOL: 1, None: 1, "CPU": 2, "CPU_PINNED": 2}
# Caches that keep all of a prompt. What others have of it, such as a window, says little of what can be found.
_WHOLE = frozenset({None, "full_attention", "mla_attention", "sink_full_attention", "unknown"})
_NIL = b"\xc0"  # in msgpack

_encode = msgspec.msgpack.Encoder().encode


class Stored(BlockStored, frozen=True, tag="BlockStored"):
    """BlockStored with what vLLM and SGLang add. `extra_keys`: by block, what its name depends on beside its tokens;
    `cache_salt`: the same for the first block of a prompt, as SGLang writes it; `group_idx`, `kv_cache_spec_kind`: of
    several caches, which models with several kinds of layers have."""

    extra_keys: Sequence[msgspec.Raw] | None = None
    cache_salt: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class Removed(BlockRemoved, frozen=True, tag="BlockRemoved"):
    """BlockRemoved with what vLLM adds."""

    group_idx: int | None = None


Heard = Stored | Removed | AllBlocksCleared


class BlockIndex:
    """Of one start of an engine. `block_size`: tokens of a block, 0 before the first one."""

    def __init__(self) -> None:
        self.block_size = 0
        self._is_whole = False
        # The cache that is followed, and whether there are others of which nothing is kept.
        self._group: int | None = None
        self._has_others = False
        # By the engine's name: ours, and where it is.
        self._blocks: dict[BlockHash, tuple[int, int]] = {}
        # How often each of our names is there.
        self._names: dict[int, int] = {}

    @property
    def is_complete(self) -> bool:
        """What is not here is not there."""
        return self._is_whole and (self._group is not None or not self._has_others)

    def __len__(self) -> int:
        return len(self._blocks)

    def has(self, name: int) -> bool:
        """Whether a block with this name of ours can be found."""
        return name in self._names

    def clear(self, is_complete: bool) -> None:
        """Begin anew. `is_complete`: nothing can be found, as far as anybody knows."""
        self._blocks.clear()
        self._names.clear()
        self._is_whole = is_complete

    def take(self, event: Heard) -> None:
        """Follow an event."""
        match event:
            case Stored():
                self._store(event)
            case Removed():
                self._remove(event)
            case AllBlocksCleared():
                self.clear(is_complete=True)

    def _store(self, event: Stored) -> None:
        medium = _MEDIA.get(event.medium)
        if medium is None or event.lora_name or event.lora_id is not None or not self._is_followed(event):
            # Not found by the engine itself, KV of another model, or another cache of the same tokens.
            return
        names = iter(self._named(event))
        for found in event.block_hashes:
            known, name = self._blocks.get(found), next(names, None)
            if known is not None:
                self._blocks[found] = (known[0], known[1] | medium)
            elif name is None or len(self._blocks) >= _MOST_BLOCKS:
                # What follows is not known either, without its beginning.
                self._is_whole = False
                return
            else:
                self._blocks[found] = (name, medium)
                self._names[name] = self._names.get(name, 0) + 1

    def _is_followed(self, event: Stored) -> bool:
        if event.kv_cache_spec_kind not in _WHOLE:
            self._has_others = True
            return False
        if self._group is None:
            self._group = event.group_idx or 0
        return self._group == (event.group_idx or 0)

    def _named(self, event: Stored) -> Iterator[int]:
        """Our names of its blocks; none if its tokens or what is before them are not known."""
        size, before = event.block_size, event.parent_block_hash
        if size <= 0 or len(event.token_ids) != size * len(event.block_hashes):
            return iter(())
        self.block_size = size
        if before is None:
            return names(size, event.token_ids, _extras(event))
        known = self._blocks.get(before)
        return iter(()) if known is None else _following(known[0], size, event.token_ids, _extras(event))

    def _remove(self, event: Removed) -> None:
        medium = _MEDIA.get(event.medium)
        if medium is None or self._group != (event.group_idx or 0):
            return
        for found in event.block_hashes:
            known = self._blocks.get(found)
            if known is None:
                continue
            name, left = known[0], known[1] & ~medium
            if left:
                self._blocks[found] = (name, left)
                continue
            del self._blocks[found]
            self._names[name] -= 1
            if not self._names[name]:
                del self._names[name]

    def audit(self) -> None:
        """Check both sides against each other."""
        assert len(self._blocks) <= _MOST_BLOCKS
        counts: dict[int, int] = {}
        for name, media in self._blocks.values():
            assert media, "a block that is nowhere"
            counts[name] = counts.get(name, 0) + 1
        assert counts == self._names, "a name without its block, or the reverse"


def names(block_size: int, token_ids: Sequence[int], extras: Iterable[bytes] = ()) -> Iterator[int]:
    """Our names of a prompt's whole blocks, each computed when it is asked for. `extras`: what else the first ones
    depend on."""
    return _following(block_size, block_size, token_ids, extras)


def salt_of(cache_salt: str) -> bytes:
    """What the first block of a prompt depends on, if the prompt has a salt."""
    return _encode([cache_salt]) if cache_salt else b""


def _following(before: int, size: int, token_ids: Sequence[int], extras: Iterable[bytes]) -> Iterator[int]:
    name, extra = before.to_bytes(_NAME_BYTES, "big"), iter(extras)
    for start in range(0, len(token_ids) - size + 1, size):
        digest = blake2b(name, digest_size=_NAME_BYTES)
        digest.update(array("I", token_ids[start : start + size]).tobytes())
        digest.update(next(extra, b""))
        name = digest.digest()
        yield int.from_bytes(name, "big")


def _extras(event: Stored) -> Iterable[bytes]:
    if event.extra_keys is None:
        return (salt_of(event.cache_salt),) if event.cache_salt and event.parent_block_hash is None else ()
    return (b"" if bytes(raw) == _NIL else bytes(raw) for raw in event.extra_keys)
