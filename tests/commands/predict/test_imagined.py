"""What options and topologies add up to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdctl.commands.bench.load import Traffic, Workload
from pdctl.commands.predict.imagined import Imagined, arrivals
from pdctl.latency import StepTimes
from pdctl.simulation.engines.profiles import Speed

TIMES = StepTimes((0.01, 0.001, 0.0, 0.0, 0.0))
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}


@pytest.mark.parametrize(("device", "dtype", "measured", "item_bytes"), [
    ("cpu", "auto", "", 4), ("cpu", "auto", "bfloat16", 2), ("cpu", "float32", "bfloat16", 4),
    ("cpu", "bfloat16", "float32", 2), ("cuda", "auto", "", 2),
])  # fmt: skip
def test_kv_has_the_number_type_of_the_engines(
    tmp_path: Path, device: str, dtype: str, measured: str, item_bytes: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "pd.toml").write_text(
        f'[service]\nmodel = "."\n[[engines]]\nname = "e"\nrole = "hybrid"\ndevice = "{device}"\ndtype = "{dtype}"\n'
        "kv_cache_gb = 1.0\n"
    )
    imagined = Imagined(file=tmp_path / "pd.toml")
    found = imagined.memory(imagined.topology(), Speed(TIMES, "a test", measured))
    assert found.token_bytes == 2 * 2 * 3 * 8 * item_bytes


def test_traffic_becomes_arrivals_with_the_lengths_that_a_service_gets() -> None:
    found, first = arrivals(Traffic(rate=5.0, inputs="10-90", outputs="7", count=50))
    assert first == []
    assert len(found) == 50
    assert all(10 <= one.inputs <= 90 and one.outputs == 7 and not one.prompt for one in found)
    assert [one.at for one in found] == sorted(one.at for one in found)
    assert arrivals(Traffic(rate=5.0, inputs="10-90", outputs="7", count=50))[0] == found
    assert arrivals(Traffic(rate=5.0, inputs="10-90", outputs="7", count=50, seed=1))[0] != found


def test_a_warm_up_sends_the_first_requests_before_and_prompts_have_content() -> None:
    found, first = arrivals(Traffic(rate=5.0, inputs="20", outputs="1", count=3, warm_up=4))
    assert [one.prompt for one in first] == [one.prompt for one in [*found, found[0]]]
    assert len({one.prompt for one in found}) == 3


def test_texts_of_a_file_that_begin_alike_have_tokens_that_begin_alike(tmp_path: Path) -> None:
    texts = ["Once upon a time there was a fox", "Once upon a time there was a hen", "Other"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "max_tokens": 4}) + "\n" for text in texts))
    found, _ = arrivals(Traffic(workload=Workload.FILE, path=path, rate=1.0))
    fox, hen, other = (one.prompt for one in found)
    assert fox[:7] == hen[:7] != other[:7]
    assert fox != hen
    assert [one.inputs for one in found] == [8, 8, 2]
