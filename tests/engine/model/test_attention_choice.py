"""Which attention backend an engine gets, and why; how libraries are called, with stand-ins that follow their docs."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pdctl.engine.model.attention import BACKENDS, Backend, choice, flashinfer, open_backend, varlen
from pdctl.engine.model.attention.batch import LayerNeed, PoolNeed
from pdctl.engine.model.attention.choice import AttentionRefused, choose, first_of
from pdctl.names.attention import ATTENTION_NAMES
from tests.engine.model.attention_mixes import Mix, mix

CPU = torch.device("cpu")
FP32 = PoolNeed(torch.float32, 16)
PLAIN = LayerNeed(4, 2, 16, 16)
LAYERS = [PLAIN, PLAIN._replace(window=24), PLAIN._replace(softcap=5.0), PLAIN._replace(window=8, has_sinks=True)]


def test_a_topology_can_name_every_backend() -> None:
    assert ("auto", *BACKENDS) == ATTENTION_NAMES


def test_on_a_cpu_gather_takes_what_the_compiled_kernel_does_not() -> None:
    torch.set_num_threads(2)
    chosen = choose("auto", LAYERS, FP32, CPU)
    torch.set_num_threads(1)
    assert (chosen.backend.name, chosen.reason[:24]) == ("gather", "always right; not native")
    assert choose("gather", LAYERS, FP32, CPU).reason == "named in the topology"


@pytest.mark.parametrize("name", ["triton", "varlen"])
def test_a_named_backend_that_cannot_work_is_refused(name: str) -> None:
    with pytest.raises(AttentionRefused, match=f"not {name}: it needs a GPU"):
        choose(name, LAYERS, FP32, CPU)


def test_what_is_not_installed_is_said() -> None:
    with pytest.raises(AttentionRefused, match="not flashinfer: it is not installed"):
        choose("flashinfer", LAYERS, FP32, CPU)


class Other:
    """Gather with a fault."""

    name = "other"
    is_capturable = False

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor], refusal: str = "") -> None:
        self._spoil = spoil
        self._refusal = refusal
        self._gather = open_backend("gather", CPU)
        self.begin = self._gather.begin

    def refuses(self, need: LayerNeed, pool: PoolNeed) -> str:
        return self._refusal if need.softcap else ""

    def attend(self, *arguments: Any) -> torch.Tensor:
        return self._spoil(self._gather.attend(*arguments))


def one_row(out: torch.Tensor) -> torch.Tensor:
    out[-1, 0] += 0.01
    return out


def raises(out: torch.Tensor) -> torch.Tensor:
    raise ValueError("no  kernel\nimage")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Other(one_row), "not other: it differs from gather by 0.01 where "),
        (Other(lambda out: out * torch.nan), "not other: it differs from gather by nan"),
        (Other(raises), "not other: no kernel image"),
        (Other(lambda out: out, "it has no soft-capping"), "not other: it has no soft-capping"),
    ],
)
def test_a_backend_that_is_wrong_or_fails_is_passed_over(
    other: Backend, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str, device: torch.device) -> Backend:
        return other if name == "other" else open_backend(name, device)

    monkeypatch.setattr(choice, "open_backend", opened)
    chosen = first_of(["other", "gather"], LAYERS, FP32, CPU)
    assert chosen.backend.name == "gather"
    assert chosen.reason.startswith(f"always right; {reason}")


def test_a_backend_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Other(lambda out: out)
    real = open_backend
    monkeypatch.setattr(choice, "open_backend", lambda name, device: right if name == "other" else real(name, device))
    chosen = first_of(["other", "gather"], LAYERS, FP32, CPU)
    assert chosen == (right, "agrees with gather on this device")


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_gather_itself_in_every_number_type(block_size: int, dtype: torch.dtype) -> None:
    for layer in LAYERS:
        choice.check(open_backend("gather", CPU), layer, PoolNeed(dtype, block_size), CPU)


# -- libraries ---------------------------------------------------------------------------------------------------

ROWS = [(0, 1), (40, 1), (0, 19), (70, 33), (300, 1)]
SINGLE = [(0, 1), (40, 1), (700, 1)]


def explicit(
    made: Mix, lengths: torch.Tensor, table: torch.Tensor, left: int, causal: bool, scale: float
) -> torch.Tensor:
    """Flash attention's definition over pages: the last query is aligned with the last key; `left` keys before it."""
    starts = made.batch.host.starts
    found, group = [], made.need.heads // made.need.kv_heads
    for index, length in enumerate(lengths.tolist()):
        q = made.query[starts[index] : starts[index + 1]]
        slots = (table[index][:, None] * made.block_size + torch.arange(made.block_size)).flatten()[:length]
        k, v = (plane[slots].repeat_interleave(group, 1) for plane in (made.keys, made.values))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        at, columns = torch.arange(length - len(q), length)[:, None], torch.arange(length)[None]
        seen = columns <= at if causal else torch.ones(len(q), length, dtype=torch.bool)
        seen = seen & (columns >= at - left) if left >= 0 else seen
        found.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(found)


@pytest.mark.parametrize("rows", [ROWS, SINGLE])
@pytest.mark.parametrize("window", [None, 1, 24])
def test_varlen_is_called_as_documented(
    window: int | None, rows: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mix(LayerNeed(4, 2, 16, 16, window), 256, torch.float32, rows)

    def varlen_attn(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **options: Any) -> Any:
        assert k.shape == v.shape == (len(made.keys) // 256, 256, 2, 16)
        assert cu_q.dtype == cu_k.dtype == options["seqused_k"].dtype == options["block_table"].dtype == torch.int32
        assert (max_q, max_k) == (max(count for _, count in rows), max(map(sum, rows)))
        assert options["enable_gqa"]
        left, right = options["window_size"]
        causal = right == 0
        assert causal or (max_q == 1 and left == -1)
        return explicit(made, options["seqused_k"], options["block_table"].long(), left, causal, options["scale"])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert torch.allclose(made.found(varlen.VarlenBackend()).double(), made.expected(), atol=1e-5)


def test_varlen_says_what_it_cannot() -> None:
    backend, half = varlen.VarlenBackend(), PoolNeed(torch.bfloat16, 256)
    assert backend.refuses(PLAIN, half) == ""
    assert "not in float32" in backend.refuses(PLAIN, PoolNeed(torch.float32, 256))
    assert "not of 16" in backend.refuses(PLAIN, PoolNeed(torch.bfloat16, 16))
    assert "heads of 20" in backend.refuses(PLAIN._replace(key_dim=20, value_dim=20), half)
    assert "values of 8" in backend.refuses(PLAIN._replace(value_dim=8), half)
    assert "soft-capping" in backend.refuses(PLAIN._replace(softcap=1.0), half)
    assert "sinks" in backend.refuses(PLAIN._replace(has_sinks=True), half)


class Paged:
    """FlashInfer's wrappers, over the tables that they were planned with."""

    def __init__(self, made: Mix, is_decode: bool, made_with: dict[str, Any]) -> None:
        self.made, self.is_decode, self.made_with = made, is_decode, made_with
        self.plans: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def plan(self, *tables: Any, **options: Any) -> None:
        self.plans.append((tables, options))

    def run(self, query: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        tables, options = self.plans[-1]
        assert options.get("causal", False) is not self.is_decode
        if not self.is_decode:
            assert (tables[0] == self.made.batch.starts).all()
            tables = tables[1:]
        pages, blocks, last, heads, kv_heads, size, page_size = tables
        assert (heads, kv_heads, size) == self.made.need[:3]
        assert paged_kv_cache[0].shape == (len(self.made.keys) // page_size, page_size, kv_heads, size)
        counts = pages[1:] - pages[:-1]
        assert all(table.dtype == torch.int32 for table in (pages, blocks, last))
        assert ((last >= 1) & (last <= page_size)).all()
        padded = torch.zeros(len(counts), int(counts.max()), dtype=torch.long)
        for index, count in enumerate(counts.tolist()):
            padded[index, :count] = blocks[pages[index] : pages[index] + count]
        lengths = (counts - 1) * page_size + last
        return explicit(self.made, lengths, padded, options["window_left"], True, options["sm_scale"])


@pytest.mark.parametrize("rows", [ROWS, SINGLE])
@pytest.mark.parametrize("window", [None, 24])
def test_flashinfer_is_called_as_documented(window: int | None, rows: list[tuple[int, int]]) -> None:
    made = mix(LayerNeed(4, 2, 16, 16, window), 16, torch.float32, rows)
    wrappers: list[Paged] = []

    def wrapper(is_decode: bool) -> Callable[..., Paged]:
        def build(workspace: torch.Tensor, layout: str, **options: Any) -> Paged:
            assert layout == "NHD"
            wrappers.append(Paged(made, is_decode, options))
            return wrappers[-1]

        return build

    module = types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=wrapper(True), BatchPrefillWithPagedKVCacheWrapper=wrapper(False)
    )
    backend = flashinfer.FlashInferBackend(module, CPU)
    for _ in range(2):
        assert torch.allclose(made.found(backend).double(), made.expected(), atol=1e-5)
    assert [len(one.plans) for one in wrappers] == [2], "one plan per step"
    if rows is SINGLE:
        made.batch.is_static = True
        assert torch.allclose(made.found(backend).double(), made.expected(), atol=1e-5)
        assert len(wrappers) == 2, "a graph has a wrapper of its own"
        buffers = wrappers[1].made_with
        assert buffers["use_cuda_graph"]
        assert len(buffers["paged_kv_indices_buffer"]) >= int(wrappers[1].plans[-1][0][0][-1])


def test_flashinfer_says_what_it_cannot() -> None:
    backend = flashinfer.FlashInferBackend(types.SimpleNamespace(), CPU)
    need, half = LayerNeed(8, 2, 128, 128, 16, 30.0), PoolNeed(torch.float16, 16)
    assert backend.refuses(need, half) == ""
    assert "float32" in backend.refuses(need, PoolNeed(torch.float32, 16))
    assert "heads of 80" in backend.refuses(need._replace(key_dim=80, value_dim=80), half)
    assert "sinks" in backend.refuses(need._replace(has_sinks=True), half)
