"""What the tests of this kind share: a request, an attempt, a launch, and the calls of a link and a sweep."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from pdctl.adapters import Assignment, Attempt, Launch, Peer, RequestState, Target, control, launcher
from pdctl.host import Host
from pdctl.net.http_client import ConnectionPool
from pdctl.net.internal_calls import Caller
from pdctl.proxy_wire import EngineAddress
from pdctl.topology.loader import load_text
from pdctl.topology.spec import Device, EngineGroup, Role, Topology
from pdctl.wire import LinkInfo, PeerAddress

PREFILL = EngineAddress("p0", "prefill", "lmdeploy", "10.0.0.1", 1)
DECODE = EngineAddress("d0", "decode", "lmdeploy", "10.0.0.2", 2)
ATTEMPT = Attempt("a1", PREFILL, DECODE)
HELD = b'{"session":7,"token":5,"blocks":[1,2]}'
PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}


def state(chat: bool = False, **fields: object) -> RequestState:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in {**prompt, **fields}.items()}
    return RequestState(PATHS[chat], chat, dict(raw), model="m")


def a_topology() -> Topology:
    """One with a single group."""
    text = '[service]\nmodel = "sample:tiny-qwen3"\nserved_model_name = "m"\n[[engines]]\nname = "e"\nrole = "hybrid"\n'
    host = Host((0,), (), 2**34, {}, "/usr/bin/python3", Path("/t"), Path("/t"), Path("/t"))
    return load_text(text, "pdctl.toml", host)


def launched(every: bool = False, **settings: Any) -> Launch:
    """The launch of a group with these settings; `every`: with a value for every key that has a flag."""
    topology = a_topology()
    if every:
        settings |= {"max_num_seqs": 4, "quantization": "awq", "gpu_memory_utilization": 0.5, "block_size": 32}
    group = group_of(topology.engines[0], **settings)
    given = Assignment("e-0", group, "10.0.0.9", {"http": 4000}, ("GPU-1",), ("mlx5_0",), "/m", Path("/r"), "/py")
    return launcher("lmdeploy").launch(topology, given)


def group_of(group: EngineGroup, **settings: Any) -> EngineGroup:
    settings = {name: Role(value) if name == "role" else value for name, value in settings.items()}
    return replace(group, kind="lmdeploy", device=Device.CUDA, given=frozenset(settings), **settings)


class Scripted:
    """An engine of a link: keeps what it gets, and answers as LMDeploy does, or with `answers` by the path's end."""

    def __init__(self, tp: int = 1, dtype: str = "bf16", **answers: object) -> None:
        config = {"tp_size": tp, "ep_size": 1, "dp_size": 1, "pp_size": None, "dp_rank": 0, "block_size": 64,
                  "num_cpu_blocks": 0, "num_gpu_blocks": 1024}  # fmt: skip
        pool = {"shape": [24, 1024, 64, 4, 128], "dtype": dtype, "element_size": 2, "entry_axis": 1}
        rank = {"protocol": 2, "endpoint_info": '{"x":1}', "cache_pools": [pool], "of_a_later_version": 1}
        self.sent: list[tuple[str, Any]] = []
        self.headers: list[bytes] = []
        self.answers: dict[str, object] = {
            "engine_info": json.dumps(config),
            "p2p_initialize": {"status": 1, "engine_endpoint_info": {"zmq_address": "tcp://1:2"},
                               "kvtransfer_endpoint_info": [rank] * tp},
            "p2p_connect": {"status": 1}, "p2p_drop_connect": {"success": True}, "free_cache": {"status": "SUCCESS"},
            "metrics": "",
        } | answers  # fmt: skip

    def paths(self) -> list[str]:
        return [path.rpartition("/")[2] for path, _ in self.sent]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.split(b"\r\n")
                length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-l")), 0)
                path, raw = lines[0].split()[1].decode(), await reader.readexactly(length)
                self.headers.append(head)
                if raw:
                    self.sent.append((path, msgspec.json.decode(raw)))
                found = self.answers[path.rpartition("/")[2]]
                status = found if isinstance(found, int) else 200
                data = found if isinstance(found, bytes) else msgspec.json.encode(found)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(data), data))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def linked(reader: Scripted, *servers: Scripted, timeout_s: float = 30.0) -> list[LinkInfo]:
    """What `link` answers for these engines."""

    async def run() -> list[LinkInfo]:
        ends = [await asyncio.start_server(engine.serve, "127.0.0.1", 0) for engine in (reader, *servers)]
        pools = [ConnectionPool("127.0.0.1", end.sockets[0].getsockname()[1]) for end in ends]
        first, *others = [Target(pool, Caller(f"key{number}")) for number, pool in enumerate(pools)]
        peers = [
            Peer(PeerAddress(f"p{number}", other.pool.host, other.pool.port, "e"), other)
            for number, other in enumerate(others)
        ]
        faces = control("lmdeploy")
        found = await faces.link(first, peers, timeout_s)
        for peer in peers:
            await faces.unlink(first, peer, timeout_s)
        for pool in pools:
            pool.close()
        for end in ends:
            end.close()
        return found

    return asyncio.run(run())


def swept(engine: Scripted, done: int, sent: int) -> int:
    """What `sweep` answers."""

    async def run() -> int:
        async with await asyncio.start_server(engine.serve, "127.0.0.1", 0) as end:
            pool = ConnectionPool("127.0.0.1", end.sockets[0].getsockname()[1])
            found = await control("lmdeploy").sweep(Target(pool, Caller("key")), done, sent, 30.0)
            pool.close()
        return found

    return asyncio.run(run())


def conversation() -> list[tuple[str, Any]]:
    """Every call of a link, its end and a sweep: path and body."""
    reader, server = Scripted(), Scripted()
    [made] = linked(reader, server)
    assert not made.error
    engine = Scripted()
    swept(engine, 0, 1)
    return [*reader.sent, *server.sent, *engine.sent[:1]]
