"""Every body that pdctl sends is accepted by LMDeploy's own classes, and every flag exists in its command line.

LMDeploy is installed without its dependencies by `scripts/lmdeploy-schemas DIR`; PDCTL_LMDEPLOY_PYTHON names the
interpreter there. Without it, these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdctl.adapters import Call, dialect
from pdctl.adapters.lmdeploy.dialect import _KNOWN
from tests.adapters.lmdeploy.messages import ATTEMPT, HELD, conversation, launched, state

PYTHON = os.environ.get("PDCTL_LMDEPLOY_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="PDCTL_LMDEPLOY_PYTHON is not set: run scripts/lmdeploy-schemas DIR")
CLASSES = {False: "CompletionRequest", True: "ChatCompletionRequest"}


def refusals(*asked: tuple[str, object]) -> list[str]:
    script = Path(__file__).parent / "schemas.py"
    given = json.dumps([{"class": name, "body": body} for name, body in asked])
    done = subprocess.run([PYTHON, str(script)], input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def lmdeploys_folder() -> Path:
    """Where LMDeploy is installed."""
    where = subprocess.run(
        [PYTHON, "-c", "import importlib.util as u; print(u.find_spec('lmdeploy').submodule_search_locations[0])"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.strip()  # fmt: skip
    return Path(where)


def body(call: Call) -> Any:
    return msgspec.json.decode(call.body)


@pytest.mark.parametrize("chat", [False, True])
def test_generation_calls_are_lmdeploys(chat: bool) -> None:
    speaks, asked = dialect("lmdeploy"), state(chat, min_tokens=3, seed=2**61, stop=["x"], temperature=0.5)
    calls = [
        speaks.prefill_call(asked, ATTEMPT),
        speaks.decode_call(asked, ATTEMPT, HELD, stream=True),
        speaks.decode_call(asked, ATTEMPT, HELD, stream=False),
        speaks.decode_call(asked, ATTEMPT, None, stream=True),
    ]
    found = refusals(*((CLASSES[chat], body(call)) for call in calls))
    assert found == [""] * 4


def test_the_check_itself_finds_what_is_wrong() -> None:
    wrong = {"model": "m", "prompt": "x"}
    found = refusals(
        ("CompletionRequest", {"prompt": "x"}),
        ("CompletionRequest", {**wrong, "mx_tokens": 1}),
        ("CompletionRequest", {**wrong, "migration_request": {"protocol": "RDMA"}}),
        ("DistServeConnectionRequest", {}),
    )
    assert all(found)


def test_known_fields_are_lmdeploys() -> None:
    """Those that the proxy itself uses, and `min_tokens`, which gets LMDeploy's name, are not."""
    ours = {"best_of", "priority", "return_token_ids", "min_tokens"}
    for chat, path in ((False, "/v1/completions"), (True, "/v1/chat/completions")):
        for name in _KNOWN[path] - ours:
            [found] = refusals((CLASSES[chat], {name: None}))
            assert "has no" not in found


def test_the_calls_of_a_link_are_lmdeploys() -> None:
    names = {
        "p2p_initialize": "DistServeInitRequest", "p2p_connect": "DistServeConnectionRequest",
        "p2p_drop_connect": "DistServeDropConnectionRequest", "free_cache": "DistServeCacheFreeRequest",
    }  # fmt: skip
    sent = conversation()
    asked = [(names[path.rpartition("/")[2]], found) for path, found in sent]
    assert {name for name, _ in asked} == set(names.values())
    assert refusals(*asked) == [""] * len(asked)


def test_every_flag_is_one_of_lmdeploys() -> None:
    source = "".join((lmdeploys_folder() / "cli" / name).read_text() for name in ("serve.py", "utils.py"))
    known = set(re.findall(r"'(--[a-z-]+)'", source))
    given = [word for word in launched(tensor_parallel=2, every=True).argv if word.startswith("--")]
    assert len(given) > 12
    assert set(given) <= known
    assert "--api-keys" in known
