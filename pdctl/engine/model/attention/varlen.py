"""PyTorch's own flash attention over a block table: `torch.nn.attention.varlen`, since PyTorch 2.12."""

from __future__ import annotations

import inspect

import torch

from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed, PoolNeed

# Flash attention 2 reads pages of a multiple of so many tokens.
_PAGE = 256
_LARGEST_HEAD = 256


class VarlenBackend:
    """See Backend."""

    name = "varlen"
    is_capturable = True

    def refuses(self, need: LayerNeed, pool: PoolNeed) -> str:
        """See Backend.refuses. The limits are those of PyTorch 2.13's mha_varlen_fwd."""
        if pool.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 and bfloat16, not in {str(pool.dtype).removeprefix('torch.')}"
        if pool.block_size % _PAGE:
            return f"it reads blocks of {_PAGE} tokens or a multiple, not of {pool.block_size}"
        if need.key_dim != need.value_dim or need.key_dim > _LARGEST_HEAD or need.key_dim % 8:
            return f"it does not compute heads of {need.key_dim} with values of {need.value_dim}"
        if need.softcap is not None:
            return "it has no soft-capping"
        return "it has no attention sinks" if need.has_sinks else ""

    def begin(self, batch: Batch) -> None:
        """See Backend.begin."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, call: Call
    ) -> torch.Tensor:
        """See Backend.attend."""
        from torch.nn.attention.varlen import varlen_attn

        # One new token sees everything. Said so, the kernel computes the heads of a group together.
        window = (-1, 0) if batch.longest_query > 1 else (-1, -1)
        if call.window is not None:
            window = (call.window - 1, 0)
        out = varlen_attn(
            query.contiguous(),
            keys.view(-1, batch.block_size, *keys.shape[1:]),
            values.view(-1, batch.block_size, *values.shape[1:]),
            batch.starts,
            # Required and unused: `seqused_k` is read instead.
            batch.starts,
            batch.longest_query,
            batch.longest,
            scale=call.scale,
            window_size=window,
            enable_gqa=query.shape[1] != keys.shape[1],
            seqused_k=batch.lengths,
            block_table=batch.table,
        )
        assert isinstance(out, torch.Tensor)
        return out


def open_backend(device: torch.device) -> VarlenBackend:
    """See Kind.open_backend."""
    from torch.nn.attention.varlen import varlen_attn  # missing before PyTorch 2.10

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise RuntimeError(f"it takes no block table in PyTorch {torch.__version__}")
    if device.type != "cuda":
        raise RuntimeError("it needs a GPU")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError("it needs a GPU of compute capability 8.0 or newer")
    return VarlenBackend()
