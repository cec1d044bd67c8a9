"""A bundle contains the data for a bug report, and no secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.doctor.bundle import clean

SECRETS = {
    "authorization: Bearer abc.DEF-123_456": "abc.DEF",
    'OPENAI_API_KEY="sk-proj-0123456789abcdef"': "0123456789",
    "HF_TOKEN=hf_abcdefghijklmnop": "abcdefgh",
    "url = http://user:hunter22@host/": "hunter22",
    "-----BEGIN PRIVATE KEY-----\nMIIEv\n-----END PRIVATE KEY-----": "MIIEv",
    'db_password = "correct horse"': "horse",
    '{"client_secret": "s3cr3t"}': "s3cr3t",
    "AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE": "IOSFOD",
    "DB_PASS=letmein99": "letmein99",
    'passphrase = "open sesame"': "sesame",
    "SESSION_COOKIE=abc-1-def": "abc-1-def",
    "api_key: 12345678-abcd-ef": "12345678",
    "password = 123456": "123456",
    "X-API-Key: zzz yyy": "yyy",
    "Authorization: Token abcdef": "abcdef",
    "pid 41 (vllm serve --api-key hunter22 --port 1)": "hunter22",
    "['vllm', '--api-key', 'hunter22']": "hunter22",
    "http://:pw12345@h/": "pw12345",
    "http://user:pa/ss@h": "pa/ss",
    "http://token12@h": "token12",
    "http://user:p@ss99@h": "ss99",
    "client sent pdctl-abcdefghijklmnopqrstuv": "abcdefgh",
    "{'content': 'tell nobody'}": "nobody",
    '{\\"prompt\\": \\"tell nobody\\"}': "nobody",
    "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj": "MIIEv",
    '{"prompt": "my \\"private\\" question", "max_tokens": 4}': "private",
    '{"messages": [{"role": "user", "content": "tell nobody"}], "n": 1}': "nobody",
    '{"choices": [{"index": 0, "text": " the answer"}]}': "answer",
}


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_and_prompts_are_removed(text: str) -> None:
    assert SECRETS[text] not in clean(text)
    assert "[removed]" in clean(text)


@pytest.mark.parametrize("text", ["max_tokens: 12", "tokens=0.5 a second", "prefill-0 is ready", '"lid": "0x2d"'])
def test_what_is_no_secret_stays(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize("part", ["x", '"prompt": ["', "api_key", "-----BEGIN ", "://a:", '"text":"'])
def test_no_text_takes_it_long(part: str) -> None:
    """A pattern with quadratic run time would take minutes here."""
    text = part * (60_000 // len(part))
    assert clean(text) is not None
    assert clean(f"{text}\n" * 4)
    assert clean("y" * 70_000 + "\nnext\n") == "[a line of 70001 characters was removed]\nnext\n"


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='"\\'), min_size=8, max_size=40))
def test_no_prompt_survives(prompt: str) -> None:
    line = json.dumps({"prompt": f"<{prompt}>", "seed": 1})
    assert f"<{prompt}>" not in clean(line)


def test_the_file(tmp_path: Path) -> None:
    (tmp_path / "far.secret").write_text("topsecretvalue")
    (tmp_path / "pdctl.toml").write_text(
        '[service]\nname = "b"\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\n'
        'env = { MY_TOKEN = "tok-1234567", NCCL_DEBUG = "WARN", ODD = "plain-words-9", T = """over\\ntwo lines""" }\n'
    )
    logs = tmp_path / "state/b/logs"
    logs.mkdir(parents=True)
    (logs / "e-0.log").write_text(("x" * 80 + "\n") * 5_000 + '\nrequest {"prompt": "who am I"} failed\nlast line\n')
    (logs / "exits.jsonl").write_text('{"process": "e-0", "signal": 9}\n')
    env = {**os.environ, "PDCTL_STATE": str(tmp_path / "state"), "MC_SECRET": "mc-secret-value", "MC_GID_INDEX": "3"}
    out = tmp_path / "out.tar.gz"
    out.touch(mode=0o644)
    done = subprocess.run(
        [sys.executable, "-m", "pdctl", "doctor", "--bundle", str(out)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "out.tar.gz contains findings.json, facts.json" in done.stderr, done.stderr
    assert out.stat().st_mode & 0o777 == 0o600
    with tarfile.open(out) as archive:
        parts = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            parts[member.name.removeprefix("pdctl-doctor/")] = file.read().decode()
    assert {"findings.json", "facts.json", "versions.json", "environment.json", "plan.json", "topology.json",
            "logs/e-0.log", "logs/exits.jsonl"} == set(parts)  # fmt: skip
    whole = "".join(parts.values())
    for hidden in ("tok-1234567", "mc-secret-value", "who am I", "plain-words-9", "two lines"):
        assert hidden not in whole
    assert parts["logs/e-0.log"].endswith("last line\n")
    assert len(parts["logs/e-0.log"]) < 300_000
    assert json.loads(parts["versions.json"])["torch"]
    assert json.loads(parts["environment.json"])["MC_GID_INDEX"] == "3"
    assert json.loads(parts["findings.json"])
    assert json.loads(parts["plan.json"])["service"] == "b"
    assert json.loads(parts["topology.json"])["engines"][0]["env"]["NCCL_DEBUG"] == "WARN"
    assert not list(tmp_path.glob(".out*"))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pdctl", "doctor", "rdma", "--bundle", str(tmp_path / "none/out.tar.gz")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "hint:" in done.stderr
