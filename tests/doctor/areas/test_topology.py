"""Problems of a topology that loads without errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.doctor.areas.topology import TopologyFacts, check
from pdctl.host import Host, read_host
from pdctl.host.devices.gpu import Gpu
from pdctl.host.models import read_shape
from pdctl.plan import make_plan
from pdctl.topology.loader import load_file

CONFIG = {
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 10,
    "max_position_embeddings": 4096, "dtype": "bfloat16", "hidden_size": 512,
}  # fmt: skip
ENGINE = '[[engines]]\nname = "e"\nrole = "hybrid"\n'


@pytest.fixture(scope="module")
def host() -> Host:
    return replace(read_host(), gpus=(Gpu(0, "GPU-0", "x", 80 << 30), Gpu(1, "GPU-1", "x", 80 << 30)))


def model(tmp_path: Path, weights: int = 1000, **config: object) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if weights:
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(weights)
    return folder


def found(tmp_path: Path, host: Host, engines: str, service: str = "", where: Path | None = None) -> dict[str, str]:
    folder = where or model(tmp_path)
    path = tmp_path / "pdctl.toml"
    path.write_text(f'[service]\nmodel = "{folder}"\n{service}\n{engines}')
    topology = load_file(path, host)
    placed: dict[int, dict[str, int]] = {}
    for spec in make_plan(topology, host).processes:
        for uuid in spec.gpus:
            groups = placed.setdefault(int(uuid[-1]), {})
            groups[spec.group] = groups.get(spec.group, 0) + 1
    facts = TopologyFacts(topology, host, folder, placed)
    return {finding.id: f"{finding.severity.value}: {finding.fix}" for finding in check(facts)}


def weight_bytes(folder: Path) -> int:
    shape = read_shape(folder)
    assert shape is not None
    return shape.weight_bytes


def test_what_a_model_takes(tmp_path: Path) -> None:
    shape = read_shape(model(tmp_path, 5000))
    assert shape is not None
    assert (shape.kv_token_bytes, shape.weight_bytes, shape.positions) == (2 * 2 * 10 * 2 * 64, 5000, 4096)
    nested = read_shape(model(tmp_path, 5000, text_config={**CONFIG, "dtype": "float32", "num_hidden_layers": 1}))
    assert nested is not None
    assert (nested.kv_token_bytes, nested.weight_bytes) == (2 * 2 * 2 * 64, 2500)
    assert read_shape(tmp_path / "none") is None
    (tmp_path / "model/config.json").write_text('{"num_attention_heads": "many"}')
    assert read_shape(tmp_path / "model") is None


def test_nothing_wrong(tmp_path: Path, host: Host) -> None:
    assert found(tmp_path, host, ENGINE) == {"topology.valid": "ok: "}


def test_a_model_without_weights(tmp_path: Path, host: Host) -> None:
    assert found(tmp_path, host, ENGINE, where=model(tmp_path, 0))["model.weights"].startswith("critical")


def test_weights_that_are_there_twice_count_once(tmp_path: Path) -> None:
    folder = model(tmp_path, 5000)
    (folder / "consolidated.safetensors").write_bytes(b"x" * 5000)
    assert weight_bytes(folder) == 5000
    (folder / "model.safetensors").unlink()
    for part in ("a", "b"):
        (folder / f"model-{part}.safetensors").write_bytes(b"x" * 700)
    stale = {"weight_map": {"x": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    (folder / "model.safetensors").write_bytes(b"x" * 900)
    assert weight_bytes(folder) == 900, "a whole file counts, whatever an old index says"
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-a.safetensors", "y": "model-b.safetensors", "z": "model-b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes(folder) == 1400


def test_shards_that_are_missing(tmp_path: Path, host: Host) -> None:
    folder = model(tmp_path, 0)
    (folder / "a.safetensors").write_bytes(b"x")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert found(tmp_path, host, ENGINE, where=folder)["model.weights"] == "critical: download it again"


@pytest.mark.parametrize("config", [{"num_attention_heads": 0, "head_dim": 0}, {"num_hidden_layers": "many"}])
def test_configurations_that_make_no_sense(tmp_path: Path, config: dict[str, object]) -> None:
    assert read_shape(model(tmp_path, 10, **config)) is None
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/model.safetensors").symlink_to("nowhere")
    assert weight_bytes(model(tmp_path, 0)) == 0


def test_more_tokens_than_positions(tmp_path: Path, host: Host) -> None:
    fired = found(tmp_path, host, ENGINE, "max_model_len = 5000")["topology.context"]
    assert fired == "critical: max_model_len = 4096 under [service]"
    assert "topology.context" not in found(tmp_path, host, ENGINE, "max_model_len = 4096")


def test_a_pool_that_holds_no_full_request(tmp_path: Path, host: Host) -> None:
    # 10,240 bytes per token on the CPU: 2,048 tokens need 0.0195 GiB.
    small = ENGINE + "kv_cache_gb = 0.01\n"
    fired = found(tmp_path, host, small)["topology.kv_pool"]
    assert fired == "warning: kv_cache_gb = 0.02, or max_model_len = 1048"
    assert "topology.kv_pool" not in found(tmp_path, host, ENGINE + "kv_cache_gb = 0.02\n")


CUDA = '[[engines]]\nname = "e"\nrole = "hybrid"\ndevice = "cuda"\n'


@pytest.mark.parametrize(
    ("engines", "fix"),
    [
        (CUDA + "gpus = [0]\nkv_cache_gb = 60\n", ""),
        (CUDA + "gpus = [0]\nkv_cache_gb = 69\n", "warning: kv_cache_gb = 68 for each, or one GPU per engine"),
        (CUDA + "gpus = [0]\nkv_cache_gb = 79\n", "critical: kv_cache_gb = 68 for each, or one GPU per engine"),
        (CUDA + "gpus = [0]\nshare_gpu = true\nreplicas = 2\nkv_cache_gb = 31\n",
         "critical: kv_cache_gb = 28 for each, or one GPU per engine"),
        (CUDA + "gpus = [0]\nshare_gpu = true\nreplicas = 2\nkv_cache_gb = 28\n", ""),
        (CUDA + "share_gpu = true\nreplicas = 4\nkv_cache_gb = 31\n",
         "critical: kv_cache_gb = 28 for each, or one GPU per engine"),
        (CUDA + "gpus = [0]\nshare_gpu = true\nreplicas = 9\nkv_cache_gb = 1\n",
         "critical: one GPU per engine, or a smaller model"),
    ],
)  # fmt: skip
def test_gpus_that_are_too_small(tmp_path: Path, host: Host, engines: str, fix: str) -> None:
    assert found(tmp_path, host, engines, where=model(tmp_path, 10 << 30)).get("gpu.memory", "") == fix


def test_engines_that_the_plan_puts_on_two_gpus_are_not_added_up(tmp_path: Path, host: Host) -> None:
    one = CUDA.replace('"hybrid"', '"{0}"').replace('"e"', '"{0}"') + "share_gpu = true\nkv_cache_gb = 50\n"
    two = one.format("prefill") + one.format("decode")
    assert "gpu.memory" not in found(tmp_path, host, two, where=model(tmp_path, 10 << 30))
    alone = CUDA + "kv_cache_gb = 500\n"
    assert found(tmp_path, host, alone, where=model(tmp_path, 10 << 30))["gpu.memory"].startswith("critical")


def test_kinds_that_cannot_pair(tmp_path: Path, host: Host) -> None:
    prefill = '[[engines]]\nname = "p"\nrole = "prefill"\n'
    decode = '[[engines]]\nname = "d"\nrole = "decode"\nkind = "vllm"\nurl = "http://127.0.0.1:1"\n'
    assert found(tmp_path, host, prefill + decode)["topology.pairs"].startswith("critical")
    both = prefill + decode + '[[engines]]\nname = "d2"\nrole = "decode"\n'
    assert found(tmp_path, host, both)["topology.pairs"].startswith("warning")
    assert "topology.pairs" not in found(tmp_path, host, both.replace(decode, ""))


def test_block_sizes(tmp_path: Path, host: Host) -> None:
    two = ENGINE + ENGINE.replace('"e"', '"f"') + "block_size = 32\n"
    assert found(tmp_path, host, two)["topology.blocks"] == "info: block_size = 32 for all"


def test_a_secret_that_cannot_be_read(tmp_path: Path, host: Host) -> None:
    attached = ENGINE + 'url = "http://127.0.0.1:1"\nsecret_file = "far.secret"\n'
    assert found(tmp_path, host, attached)["topology.secret"].startswith("critical")
    (tmp_path / "far.secret").write_text("x")
    assert "topology.secret" not in found(tmp_path, host, attached)


def test_one_of_a_role(tmp_path: Path, host: Host) -> None:
    one = '[[engines]]\nname = "p"\nrole = "prefill"\n[[engines]]\nname = "d"\nrole = "decode"\n'
    assert set(found(tmp_path, host, one)) == {"topology.single", "topology.valid"}
    two = one.replace('"prefill"\n', '"prefill"\nreplicas = 2\n').replace('"decode"\n', '"decode"\nreplicas = 2\n')
    assert "topology.single" not in found(tmp_path, host, two)
