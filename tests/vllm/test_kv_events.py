"""The builtin engine's KV events, decoded by vLLM's own classes."""

from __future__ import annotations

import json
import subprocess

from tests.e2e.test_kv_events import snapshot
from tests.e2e.test_prefix import tokens
from tests.service import Service, running, single, temporary_run
from tests.vllm.conftest import PYTHON

# Follows vllm's examples/online_serving/kv_events_subscriber.py.
SUBSCRIBER = """
import json, sys, msgspec, zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
decoder = msgspec.msgpack.Decoder(type=KVEventBatch)
replay = zmq.Context().socket(zmq.DEALER)
replay.connect("tcp://127.0.0.1:" + sys.argv[1])
replay.send_multipart((b"", (0).to_bytes(8, "big")))
blocks, kinds = set(), set()
while True:
    assert replay.poll(20_000), "no answer"
    _, _, sequence, payload = replay.recv_multipart()
    if int.from_bytes(sequence, "big", signed=True) == -1:
        break
    for event in decoder.decode(payload).events:
        kinds.add(type(event).__name__)
        if isinstance(event, BlockStored):
            assert len(event.token_ids) == event.block_size * len(event.block_hashes)
            blocks.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            blocks.difference_update(event.block_hashes)
        else:
            assert isinstance(event, AllBlocksCleared)
            blocks.clear()
print(json.dumps([sorted(blocks), sorted(kinds)]))
"""


def found_by_vllm(service: Service) -> tuple[list[int], list[str]]:
    port = service.process("hybrid-0").ports["kv-replay"]
    done = subprocess.run([PYTHON, "-c", SUBSCRIBER, str(port)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    blocks, kinds = json.loads(done.stdout.splitlines()[-1])
    return blocks, kinds


def test_vllms_classes_read_our_events() -> None:
    text = single(engine_extra='kv_events = "tokens"', kv_cache_gb=0.005)
    with temporary_run() as run, running(run, text) as service:
        for number in range(24):
            service.complete(tokens(number, 100 + 20 * number), max_tokens=4)
        service.idle()
        blocks, kinds = found_by_vllm(service)
        assert kinds == ["AllBlocksCleared", "BlockRemoved", "BlockStored"]
        taken = snapshot(service, "hybrid-0")["events"]
        assert blocks == sorted(hash for event in taken for hash in event["block_hashes"])
        assert blocks
