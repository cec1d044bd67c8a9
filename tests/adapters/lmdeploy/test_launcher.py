"""The command line of an LMDeploy engine, and the settings that it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from pdctl.adapters import Installed, launcher
from pdctl.topology.spec import Device, Topology
from tests.adapters.lmdeploy.messages import a_topology, group_of, launched


def topology(*groups: dict[str, Any]) -> Topology:
    found = a_topology()
    engines = tuple(group_of(found.engines[0], **group) for group in groups)
    return replace(found, engines=engines)


def faults(first: dict[str, Any], *others: dict[str, Any], version: str = "0.18.0") -> set[str]:
    found = topology(first, *others)
    return {fault.key for fault in launcher("lmdeploy").faults(found, found.engines[0], ("lmdeploy", version))}


def after(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_a_prefill_engine_takes_whole_prompts_at_once() -> None:
    argv = launched(role="prefill").argv
    assert after(argv, "--role") == "Prefill"
    assert after(argv, "--max-prefill-token-num") == after(argv, "--session-len") == "2048"
    assert after(argv, "--migration-backend") == "DLSlime"
    assert after(argv, "--backend") == "pytorch"


def test_settings_become_flags_only_if_given() -> None:
    plain, full = launched().argv, launched(every=True, tensor_parallel=2, connector="Mooncake").argv
    for flag in ("--max-batch-size", "--model-format", "--cache-max-entry-count"):
        assert flag not in plain
        assert flag in full
    assert (after(full, "--tp"), after(full, "--migration-backend")) == ("2", "Mooncake")


def test_the_key_is_in_no_argument() -> None:
    launch = launched()
    assert launch.api_key_env
    assert f"environ.pop('{launch.api_key_env}')" in launch.argv[2], "children do not get it"
    assert msgspec.json.decode(launch.generate_body)["model"] == "m", "LMDeploy answers no request without a model"


def test_pins_become_variables() -> None:
    env = launched().env
    assert (env["CUDA_VISIBLE_DEVICES"], env["SLIME_VISIBLE_DEVICES"]) == ("GPU-1", "mlx5_0")


def test_a_good_pair_has_no_faults() -> None:
    prefill, decode = {"role": "prefill"}, {"role": "decode", "max_num_seqs": 64}
    assert faults(prefill, decode) == faults(decode, prefill) == faults({"role": "hybrid"}) == set()


def test_both_ends_of_a_link_need_the_same() -> None:
    def differing(more: dict[str, Any], version: str = "0.18.0") -> set[str]:
        prefill, decode = topology({"role": "prefill"}, {"role": "decode", **more}).engines
        starts = launcher("lmdeploy")
        ends = (Installed(prefill, ("lmdeploy", "0.18.0")), Installed(decode, ("lmdeploy", version)))
        return {fault.key for fault in starts.pair_faults(*ends)}

    assert differing({}) == differing({"block_size": 64, "connector": "DLSlime", "max_num_seqs": 9}) == set()
    for key, value in (("tensor_parallel", 2), ("block_size", 32), ("connector", "Mooncake"), ("dtype", "float16")):
        assert differing({key: value}) == {key}
    assert differing({}, "0.17.0") == {"python"}


def test_what_cannot_work_is_refused() -> None:
    prefill, decode = {"role": "prefill"}, {"role": "decode"}
    assert faults(prefill) == {"role"}
    assert faults(prefill, {"role": "hybrid"}) == {"role"}
    assert faults(prefill, decode, version="0.15.2") == {"python"}
    assert faults({**prefill, "max_num_batched_tokens": 512}, decode) == {"max_num_batched_tokens"}
    assert faults({**prefill, "args": ("--proxy-url=http://x",)}, decode) == {"args"}
    found = topology(prefill, decode)
    on_cpu = replace(found.engines[0], device=Device.CPU)
    [fault] = launcher("lmdeploy").faults(replace(found, engines=(on_cpu, found.engines[1])), on_cpu, ("", ""))
    assert fault.key == "device"
