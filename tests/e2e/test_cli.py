"""Command lines, and the errors for wrong ones. Nothing is lost or left running."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pdctl.host.processes.claims import PortClaims
from tests.service import CLI, SUPERVISOR, Run, Service, pid_of, running, single, topology, wait_until

pytestmark = pytest.mark.e2e


def refused(run: Run, *words: str, code: int = 1) -> str:
    done = run.cli(*words)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "", "errors are no data"
    assert not run.processes(), "left running"
    return done.stderr


def test_init_plan_and_their_json(run: Run) -> None:
    assert run.cli("init", check=True).stdout == "pdctl.toml\n"
    assert "already exists" in refused(run, "init")
    text = run.cli("plan", check=True).stdout
    assert "prefill-0" in text
    assert "decode-0" in text
    plan = json.loads(run.cli("plan", "--json", check=True).stdout)
    assert [process["name"] for process in plan["processes"]] == ["prefill-0", "decode-0", "proxy"]
    assert not (run.folder / "r").exists(), "plan writes nothing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        (topology().replace("max_num_seqs", "max_num_sqes"), "did you mean 'max_num_seqs'?"),
        (topology(decodes=0), "prefill without decode"),
        (topology(prefills=0), "decode without prefill"),
        (topology(model="./no/such/model"), "was not found"),
        (topology(prefills=0, decodes=0), "no engines"),
    ],
    ids=["empty", "unknown key", "no decode", "no prefill", "no model", "no engine"],
)
def test_bad_topologies(run: Run, text: str, expected: str) -> None:
    run.write(text)
    for verb in (("plan",), ("up",), ("up", "-d")):
        message = refused(run, *verb)
        assert expected in message
        assert "pdctl.toml" in message


def test_usage_errors_are_the_users(run: Run) -> None:
    for words in (("nosuch",), ("up", "--nosuch"), ("ask",), ("up", "--wait", "soon")):
        assert "Usage" in refused(run, *words)


def test_a_missing_file_and_a_missing_service(run: Run) -> None:
    assert "does not exist" in refused(run, "up", "-f", "nowhere.toml")
    for verb in (("down",), ("status",), ("ask", "hi"), ("down", "-s", "nobody")):
        message = refused(run, *verb)
        assert "running" in message
        assert "hint: " in message


def test_a_taken_port_names_its_holder(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        run.write(topology(port=other.getsockname()[1]))
        for verb in (("plan",), ("up",), ("up", "-d")):
            message = refused(run, *verb)
            assert f"port {other.getsockname()[1]} is in use by pid {os.getpid()}" in message


def test_a_hub_model_that_cannot_be_had(run: Run) -> None:
    run.write(topology(model="no-such-owner/no-such-model"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        message = refused(run, "up", "-d")
    finally:
        del os.environ["HF_HUB_OFFLINE"]
    assert "no-such-owner/no-such-model" in message
    assert "was not found" in message


def test_a_model_that_cannot_be_hooked_is_refused_with_the_reason(run: Run) -> None:
    make = (
        "import sys; from tokenizers import Tokenizer, models;"
        "from transformers import BloomConfig, BloomForCausalLM as M;"
        "M(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(sys.argv[1]);"
        "Tokenizer(models.BPE()).save(sys.argv[1] + '/tokenizer.json')"
    )
    model = run.folder / "bloom"
    subprocess.run([sys.executable, "-c", make, str(model)], check=True, capture_output=True)
    run.write(single(model=str(model)))
    message = refused(run, "up", "-d")
    assert "BloomForCausalLM" in message
    assert "layers call the attention hook" in message
    assert "a restart would not help" in message


def test_a_pool_too_small_for_a_block_is_refused(run: Run) -> None:
    run.write(single(kv_cache_gb=0.00001))
    assert "at least, for 8 blocks" in refused(run, "up", "-d")


SEES_NO_CLAIMS = """
import sys
import pdctl.host
from pdctl.cli import main
read, calls = pdctl.host.claimed_ports, []
# The plans that `up` makes before it starts the supervisor: one to find the service, one to check the ports.
pdctl.host.claimed_ports = lambda *a: frozenset() if calls.append(1) or len(calls) < 3 else read(*a)
sys.argv[0] = "pdctl"
main()
"""


def test_a_port_that_the_topology_sets_is_not_tried_again(run: Run) -> None:
    run.write(single())
    port = json.loads(run.cli("plan", "--json", check=True).stdout)["proxy"]["port"]
    theirs = PortClaims()
    assert theirs.claim([port]) == []
    never = SEES_NO_CLAIMS.replace("len(calls) < 3", "True")
    words = [sys.executable, "-c", never, "up", "-d"]
    try:
        done = subprocess.run(words, env=run.env, cwd=run.folder, capture_output=True, text=True, timeout=600)
    finally:
        theirs.close()
    assert done.returncode == 1
    assert f"chosen port {port} at the same time" in done.stderr
    assert "hint: the topology sets this port: change it there" in done.stderr
    assert "choosing others" not in done.stderr
    assert not run.processes()


def test_ports_that_another_service_chooses_at_the_same_time(run: Run) -> None:
    run.write(single())
    planned = json.loads(run.cli("plan", "--json", check=True).stdout)
    ports = {port for process in planned["processes"] for port in process["ports"].values()}
    theirs = PortClaims()
    assert theirs.claim(ports - {planned["proxy"]["port"]}) == []
    words = [sys.executable, "-c", SEES_NO_CLAIMS, "up", "-d"]
    try:
        started = subprocess.run(words, env=run.env, cwd=run.folder, capture_output=True, text=True, timeout=600)
        assert started.returncode == 0, started.stderr
        assert "at the same time; choosing others" in started.stderr
        status = json.loads(run.cli("status", "--json", check=True).stdout)
        assert status["state"] == "ready"
    finally:
        run.cli("down")
        theirs.close()


def test_foreground_shows_logs_and_stops_on_ctrl_c(run: Run) -> None:
    run.write(single())
    process = subprocess.Popen(
        [*CLI, "up"], env=run.env, cwd=run.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "is ready at" in line:
            break
    assert any("hybrid-0: started" in line for line in lines)
    second = run.cli("up")
    assert second.returncode == 1
    assert "already running" in second.stderr
    assert run.cli("up", "-d").returncode == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "stopped by pdctl" in out
    assert not run.processes()


def test_a_second_ctrl_c_forces(run: Run) -> None:
    run.write(single().replace("grace_s = 10", "grace_s = 600"))
    process = subprocess.Popen(
        [*CLI, "up"], env=run.env, cwd=run.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "is ready at" in line:
            break
    fronts = [p for p in run.processes() if "serve" in p.cmdline()]
    for front in fronts:
        front.send_signal(signal.SIGSTOP)  # ignores SIGTERM
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "proxy: stopped" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    wait_until(lambda: not run.processes(), what="every process to end")


def test_status_logs_ask_and_a_light_supervisor(run: Run) -> None:
    with running(run, topology()) as service:
        status = json.loads(run.cli("status", "--json", check=True).stdout)
        assert {"service", "state", "proxy_url", "processes"} <= status.keys()
        keys = {
            "name",
            "kind",
            "role",
            "state",
            "pid",
            "restarts",
            "last_exit",
            "device",
            "cpus",
            "ready_since",
        }
        assert all(keys <= process.keys() for process in status["processes"])
        assert status["state"] == "ready"
        for process in status["processes"]:
            assert psutil.Process(process["pid"]).cpu_affinity() == process["cpus"], "pinned as planned"
        supervisor = psutil.Process(status["supervisor_pid"])
        assert supervisor.memory_info().rss < 60 * 2**20
        maps = Path(f"/proc/{supervisor.pid}/maps").read_text()
        assert "torch" not in maps
        assert "numpy" not in maps
        text = run.cli("status", check=True).stdout
        assert "service t: ready" in text
        answer = run.cli("ask", "hello", "--max-tokens", "8", check=True).stdout
        whole = service.complete("hello", max_tokens=8)
        assert answer == whole["text"] + "\n"
        assert "no process 'zzz'" in run.cli("logs", "zzz").stderr
        assert "supervisor" in run.cli("logs", check=True).stdout
        assert "answered 400" in run.cli("ask", "x" * 3000).stderr
        # no secret in command lines or logs
        secret = psutil.Process(status["processes"][0]["pid"]).environ()["PDCTL_SECRET"]
        for process in run.processes():
            assert secret not in " ".join(process.cmdline())
        for log in Path(status["log_dir"]).iterdir():
            assert secret not in log.read_text()
        for port in [p["ports"]["http"] for p in status["processes"]]:
            assert next(c.laddr.ip for c in psutil.net_connections() if c.laddr and c.laddr.port == port) == "127.0.0.1"


def test_doctor_transfer_moves_bytes_and_says_how_fast(run: Run) -> None:
    done = run.cli("doctor", "transfer", "--transport", "shm", "--mib", "8", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["transfer"]
    assert (found["transport"], found["bytes_right"], found["mib"], found["blocks"]) == ("shm", True, 8, 128)
    assert found["gbps"] > 0
    assert "moving 8 MiB" in done.stderr
    table = run.cli("doctor", "transfer", "--transport", "shm", "--mib", "1").stdout
    assert "RIGHT" in table


def test_doctor_shouts_about_a_fallback(run: Run) -> None:
    done = run.cli("doctor", "transfer", "--transport", "mooncake", "--protocol", "rdma", "--mib", "1")
    if "not available" in done.stdout:
        pytest.skip(f"NOT TESTED: {done.stderr}")
    assert done.returncode == 1
    assert "FALLBACK to tcp: RDMA is configured" in done.stderr


def test_kv_and_doctor_say_what_is_wrong(run: Run) -> None:
    done = run.cli("kv")
    assert done.returncode == 1
    assert "no service is running" in done.stderr
    assert run.cli("doctor", "transfer", "--mib", "0").returncode == 1
    assert run.cli("doctor", "nonsense").returncode == 1


@pytest.mark.parametrize("words", [["--help"], ["status"]])
def test_the_command_line_imports_nothing_heavy(run: Run, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pdctl", *words],
        env=run.env,
        cwd=run.folder,
        capture_output=True,
        text=True,
    )
    imported = {
        line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "import time:" in line
    }
    assert "typer" in imported
    assert not imported & {
        "torch",
        "transformers",
        "numpy",
        "httpx",
        "uvicorn",
        "starlette",
        "psutil",
        "msgspec",
    }


def test_a_full_disk_under_its_log_does_not_end_the_service(run: Run) -> None:
    run.write(single())
    plan = run.cli("plan", "--json", check=True).stdout
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device, every write to which fails with ENOSPC
        supervisor = subprocess.Popen(
            SUPERVISOR, env=run.env, stdin=subprocess.PIPE, stderr=full, text=True
        )
        assert supervisor.stdin is not None
        supervisor.stdin.write(plan)
        supervisor.stdin.close()
        wait_until(lambda: list((run.folder / "r").glob("*/control.sock")), what="the supervisor")
        service = Service(run)
        service.wait(lambda: service.status().state == "ready", what="the start")
        assert run.cli("ask", "hello", "--max-tokens", "4").returncode == 0
        service.client.close()
        before = service.process("hybrid-0")
        os.kill(pid_of(before), signal.SIGKILL)
        assert service.restarted(before).restarts == 1
        run.cli("down", check=True)
        assert supervisor.wait(20) == 0


@pytest.mark.parametrize(
    "words",
    [("doctor", "nonsense"), ("bench", "serve", "--workload", "nonsense"), ("status", "--nonsense"), ("nonsense",),
     ("bench", "serve", "-n", "many"), ("up", "--wait", "soon"), ("doctor", "transfer", "--mib", "0")],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors_are_in_our_words(run: Run, words: tuple[str, ...]) -> None:
    done = run.cli(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "rror" in done.stderr
    assert "Value error" not in done.stderr
    assert "unexpected" not in done.stderr


def test_devices_are_named_as_ibstatus_takes_them(run: Run) -> None:
    for words in (("rdma", "--ibstatus", "mlx5_0:1"), ("--ibstatus", "mlx5_0"), ("--ibstatus", "--port", "mlx5_0")):
        done = run.cli("doctor", *words)
        assert "Fatal error:" in done.stdout, "what ibstatus says of a device that is not there"
        assert "has no area" not in done.stderr


def shell(run: Run, line: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = f"{shlex.join(CLI)} {line}"
    return subprocess.run(
        ["bash", "-c", command], env={**run.env, **extra}, cwd=run.folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("verb", ["plan", "plan --json", "--help", "doctor --list", "bench --help"])
def test_output_that_cannot_be_written(run: Run, verb: str) -> None:
    run.write(topology())
    full = shell(run, f"{verb} > /dev/full")
    assert (full.returncode, full.stderr.splitlines()[0]) == (
        1,
        "error: stdout cannot be written: No space left on device",
    )
    for closed in (">&-", "2>&-", ">&- 2>&-", "2>/dev/full"):
        done = shell(run, f"{verb} {closed}")
        assert done.returncode == 0, (closed, done.stderr)
        assert "unexpected" not in done.stderr


def test_an_encoding_that_lacks_a_character(run: Run) -> None:
    run.write(topology().replace('served_model_name = "m"', 'served_model_name = "m\u00f6del \u2603"'))
    done = shell(run, "plan --json", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    wrong = shell(run, "plan -f n\u00f6.toml", PYTHONIOENCODING="ascii")
    assert wrong.returncode == 1
    assert "topology file n\\xf6.toml does not exist" in wrong.stderr
    missing = topology().replace('model = "sample:tiny-qwen3"', 'model = "/n\u00f6wh\u00e9re"')
    run.write(missing)
    assert "/n\\xf6wh\\xe9re" in shell(run, "plan", PYTHONIOENCODING="ascii").stderr


def test_a_missing_package_is_said_once(run: Run) -> None:
    """An installation without the engine's packages: the child reports what is missing and is not restarted."""
    (run.folder / "hidden").mkdir()
    (run.folder / "hidden" / "zmq.py").write_text("raise ModuleNotFoundError('No module named zmq', name='zmq')")
    run.write(single())
    done = run.cli("up", "-d", extra={"PYTHONPATH": str(run.folder / "hidden")})
    assert done.returncode == 1
    assert "hybrid-0 exited with code 78: the package zmq is not installed; a restart would not help" in done.stderr
