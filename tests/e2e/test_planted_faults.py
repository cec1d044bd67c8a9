"""Faults injected into a service: the doctor finds each, and its fix, applied literally, removes it.

A fix is applied automatically if it can be parsed: `export`, `unset`, a line of the topology, a shell command. Others,
such as moving an engine to another host, are coded in the test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from pdctl.plan import Plan
from tests.doctor.trees import Port, Tree, roce
from tests.service import Run, free_port

STUB = Path(__file__).parents[1] / "fakes" / "nvml_stub.c"
BASE = """[service]
name = "f"
model = "sample:tiny-qwen3"
[proxy]
port = {port}
[transfer]
backend = "mooncake"
protocol = "{protocol}"
[[engines]]
name = "e"
role = "hybrid"
kv_cache_gb = 0.1
"""


class Bench:
    """A folder with a topology, an environment, and a shell in which the doctor runs."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self.file = folder / "pdctl.toml"
        self.env: dict[str, str] = {"LD_LIBRARY_PATH": str(library)}
        self.shell: list[str] = []
        self.wrapper: list[str] = []
        self.sysfs: Path | None = None
        self.topology()

    def topology(self, text: str = BASE, protocol: str = "auto", **changes: str) -> None:
        text = text.format(port=free_port(), protocol=protocol)
        for old, new in changes.items():
            text = text.replace(old.replace("_", " "), new)
        self.file.write_text(text)

    def edit(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))

    def findings(self) -> dict[str, dict[str, Any]]:
        """Findings that require action, by id."""
        areas = "rdma gpu host net runtime topology"
        tree = f"--sysfs-root {self.sysfs}" if self.sysfs else ""
        doctor = f"{sys.executable} -m pdctl doctor {areas} --json {tree}"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MC_", "NCCL_", "UCX_"))}
        done = subprocess.run(
            [*self.wrapper, "sh", "-c", "\n".join([*self.shell, doctor])],
            cwd=self.folder, env={**env, **self.env, "PDCTL_STATE": str(self.folder / "state")},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.stdout, done.stderr
        found = json.loads(done.stdout)["findings"]
        return {finding["id"]: finding for finding in found if finding["severity"] in ("critical", "warning")}

    def follow(self, fix: str) -> None:
        """Apply the first alternative of a fix."""
        first = re.split(r"; |, or:? |, and ", fix)[0].removeprefix("stop it: ")
        if setting := re.fullmatch(r"export (\w+)=(\S+)", first):
            self.env[setting[1]] = setting[2]
        elif setting := re.fullmatch(r"unset (\w+)", first):
            del self.env[setting[1]]
        elif setting := re.fullmatch(r"(\w+) = (.+) under \[(\w+)\]", first):
            self._set(setting[1], setting[2], f"[{setting[3]}]")
        elif setting := re.fullmatch(r"(?:did you mean )?(\w+) = ([^?]+?)(?: for (?:each|all|both))?\??", first):
            self._set(setting[1], setting[2], "[service]" if setting[1] == "model" else "[[engines]]")
        elif first.startswith("kill "):
            subprocess.run(first.split(), check=True)
        elif first.startswith("ulimit "):
            # Set limits here: a lower hard limit could not be raised again in a child.
            self.shell = [*(line for line in self.shell if not line.startswith("ulimit ")), first]
        elif first.startswith("mount "):
            self.shell.append(first)
        elif first.startswith("create it with: pdctl "):
            words = first.removeprefix("create it with: pdctl ").replace("NAME", "alice").split()
            subprocess.run([sys.executable, "-m", "pdctl", *words], check=True, capture_output=True)
        else:
            raise AssertionError(f"nobody can follow this to the letter: {fix}")

    def _set(self, key: str, value: str, table: str) -> None:
        """Set a line in every table of that name, replacing an existing one."""
        lines, inside = [], False
        for line in self.file.read_text().splitlines():
            if line.startswith("["):
                inside = line == table
            if not (inside and line.split("=")[0].strip() == key):
                lines.append(line)
            if line == table:
                lines.append(f"{key} = {value}")
        self.file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", STUB], check=True)
    return folder


@pytest.fixture
def bench(tmp_path: Path, library: Path) -> Bench:
    return Bench(tmp_path, library)


@contextmanager
def stranger(*argv: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def with_roce(bench: Bench, **netdev: str) -> None:
    """A machine with one RoCE card, and a topology that uses it."""
    tree = Tree(bench.folder / "sys")
    device = tree.hca("mlx5_0", {1: roce()})
    tree.netdev("eth1", device.resolve(), **{"mtu": "9000", **netdev})
    bench.sysfs = tree.root
    bench.topology(protocol="rdma")


def gid_index(bench: Bench) -> None:
    with_roce(bench)
    bench.env["MC_GID_INDEX"] = "9"


def mtu(bench: Bench) -> None:
    with_roce(bench, mtu="1500")
    bench.env["MC_MTU"] = "4096"


def misspelt_device(bench: Bench) -> None:
    with_roce(bench)
    bench.edit('protocol = "rdma"', 'protocol = "rdma"\ndevices = ["mlx5_O"]')


def force_tcp(bench: Bench) -> None:
    with_roce(bench)
    bench.env["MC_FORCE_TCP"] = "1"


def ucx_without_rdma(bench: Bench) -> None:
    with_roce(bench)
    bench.env["UCX_TLS"] = "tcp,sm"


def device_in_the_environment(bench: Bench) -> None:
    with_roce(bench)
    bench.env["NCCL_IB_HCA"] = "=mlx5_7"


def no_rdma(bench: Bench) -> None:
    Tree(bench.folder / "sys", has_class=False)
    bench.sysfs = bench.folder / "sys"
    bench.topology(protocol="rdma")


def little_memlock(bench: Bench) -> None:
    with_roce(bench)
    bench.edit("kv_cache_gb = 0.1", "kv_cache_gb = 0.004")
    bench.wrapper = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    bench.shell = ["ulimit -l 64"]


def small_shm(bench: Bench) -> None:
    bench.wrapper = ["unshare", "--mount", "--propagation", "private"]
    bench.shell = ["mount -t tmpfs -o size=64m tmpfs /dev/shm"]


def two_on_one_gpu(bench: Bench) -> None:
    bench.env["PDCTL_STUB_GPUS"] = "1"
    text = BASE.replace("kv_cache_gb = 0.1", 'kv_cache_gb = 100\ndevice = "cuda"\nreplicas = 2\nshare_gpu = true')
    bench.topology(text)
    bench.edit('backend = "mooncake"\n', "")


def wrong_model_path(bench: Bench) -> None:
    folder = bench.folder / "models" / "gemma-270m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    bench.edit('"sample:tiny-qwen3"', f'"{folder.parent}/gema-270m"')


def too_long_a_context(bench: Bench) -> None:
    bench.edit("[proxy]", "max_model_len = 100000\n[proxy]")


def small_pool(bench: Bench) -> None:
    bench.edit("kv_cache_gb = 0.1", "kv_cache_gb = 0.002")


def http_proxy(bench: Bench) -> None:
    bench.env["http_proxy"] = "http://127.0.0.1:3128"


def port_within_ports(bench: Bench) -> None:
    bench.topology(BASE.replace("{port}", "16100"))
    bench.edit('protocol = "auto"', 'protocol = "auto"\nports = [16000, 16199]')


def no_api_keys(bench: Bench) -> None:
    bench.edit("[transfer]", f'api_keys = "{bench.folder}/keys.txt"\n[transfer]')


PLANTED: dict[str, tuple[Callable[[Bench], None], str]] = {
    "GID index at an empty slot": (gid_index, "roce.gid_index"),
    "MTU that the netdev does not carry": (mtu, "roce.mtu"),
    "a device that is misspelt": (misspelt_device, "port.gone"),
    "TCP forced beside RDMA": (force_tcp, "env.switch"),
    "UCX told to leave RDMA out": (ucx_without_rdma, "env.ucx_tls"),
    "a device in the environment that is not there": (device_in_the_environment, "env.devices"),
    "RDMA asked for and absent": (no_rdma, "rdma.none"),
    "memory that may not be locked": (little_memlock, "limit.memlock"),
    "shared memory too small": (small_shm, "shm.size"),
    "two engines on one GPU that do not fit": (two_on_one_gpu, "gpu.memory"),
    "a wrong model path": (wrong_model_path, "topology.invalid"),
    "more context than the model has": (too_long_a_context, "topology.context"),
    "a pool that holds no full request": (small_pool, "topology.kv_pool"),
    "an HTTP proxy between our processes": (http_proxy, "env.proxy"),
    "the proxy's port among mooncake's": (port_within_ports, "net.clash"),
    "API keys that are not there": (no_api_keys, "topology.invalid"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_found_and_cleared(bench: Bench, name: str, tiny_model: Path) -> None:
    plant, id_ = PLANTED[name]
    plant(bench)
    finding = bench.findings()[id_]
    bench.follow(finding["fix"])
    left = bench.findings().get(id_)
    # After the fix it works but may be slow: an MTU of 1,024 is now reported as a warning.
    assert left is None or (finding["severity"], left["severity"]) == ("critical", "warning"), left


def test_a_port_that_a_stranger_holds(bench: Bench) -> None:
    port = free_port()
    bench.topology(BASE.replace("{port}", str(port)))
    code = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(1, flush=True); time.sleep(99)"
    with stranger(sys.executable, "-c", code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        bench.follow(bench.findings()["net.ports"]["fix"])
        process.wait(10)
        assert "net.ports" not in bench.findings()


def test_gpu_memory_that_a_stranger_holds(bench: Bench) -> None:
    with stranger("sleep", "99") as process:
        use = bench.folder / "use"
        use.write_text(f"0 {process.pid} {int(140.95 * 2**30)}\n")
        bench.env |= {"PDCTL_STUB_GPUS": "1", "PDCTL_STUB_USE": str(use)}
        bench.topology(BASE.replace("kv_cache_gb = 0.1", 'kv_cache_gb = 0.1\ndevice = "cuda"'))
        bench.edit('backend = "mooncake"\n', "")
        bench.follow(bench.findings()["gpu.mem_held"]["fix"])
        process.wait(10)
        use.write_text("")  # as the driver frees memory when its holder exits
        assert "gpu.mem_held" not in bench.findings()


def test_engines_elsewhere_that_would_read_from_loopback(bench: Bench) -> None:
    far = '[[engines]]\nname = "{0}"\nrole = "{0}"\nurl = "http://10.9.8.7:{1}"\n'
    near = '[[engines]]\nname = "prefill"\nrole = "prefill"\n'
    head = BASE.split("[[engines]]")[0]
    bench.topology(head + near + far.format("decode", 8101))
    found = bench.findings()["net.loopback"]
    assert found["severity"] == "critical"
    assert "start all engines here" in found["fix"]
    bench.topology(head + near + near.replace("prefill", "decode"))
    assert "net.loopback" not in bench.findings()


def test_up_refuses_what_is_critical_and_force_starts_it(run: Run) -> None:
    port = free_port()
    text = BASE.format(port=port, protocol="auto").replace('backend = "mooncake"\nprotocol = "auto"\n', "")
    run.write(text.replace("[proxy]", "max_model_len = 100000\n[proxy]"))
    done = run.cli("up", "-d")
    assert done.returncode == 1
    assert "service.max_model_len: 100000 tokens" in done.stderr
    assert "hint: max_model_len = 4096 under [service]" in done.stderr
    assert "1 critical finding, nothing was started" in done.stderr
    assert not run.processes()
    forced = run.cli("up", "-d", "--force")
    assert "warning: service.max_model_len" in forced.stderr
    assert "is more than the 4096 positions of this model" in forced.stderr, "and so says the engine"
    run.write(text)
    assert run.cli("up", "-d").returncode == 0
    # Its own port and memory use are not problems while it is running.
    assert "net.ports" not in run.cli("doctor", "net", "topology").stdout
    assert "critical" not in run.cli("doctor").stdout
    run.cli("down", check=True)


def test_transfers_between_the_places_of_a_plan(bench: Bench) -> None:
    engines = '[[engines]]\nname = "{0}"\nrole = "{0}"\ncpus = [{1}]\n'
    cpus = sorted(os.sched_getaffinity(0))
    pair = engines.format("prefill", cpus[0]) + engines.format("decode", cpus[-1])
    bench.topology(BASE.split("[transfer]")[0] + pair)
    words = ["doctor", "transfer", "--transport", "shm", "--mib", "4", "--json"]
    done = subprocess.run([sys.executable, "-m", "pdctl", *words], cwd=bench.folder, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    [found] = json.loads(done.stdout)["transfer"]
    assert found["pair"] == "prefill-0 to decode-0"
    assert found["bytes_right"] is True
    assert found["of_link"] is None
    assert done.returncode == 0


def planned(name: str, role: str, **options: object) -> object:
    """What the probes look at of a planned process."""
    from types import SimpleNamespace

    asked = {"kind": "builtin", "argv": (sys.executable,), "cpus": (), "rdma": (), **options}
    return SimpleNamespace(name=name, role=role, is_engine=role != "proxy", **asked)


def test_the_plan_of_a_wide_machine_is_not_asked_for_each_replica() -> None:
    from types import SimpleNamespace

    from pdctl.doctor.transfer import probes

    specs = [
        planned(f"{role}-{n}", role, cpus=(number,))
        for number, role in enumerate(("prefill", "decode"))
        for n in range(4)
    ]
    plan = cast(Plan, SimpleNamespace(processes=(*specs, planned("proxy", "proxy", kind="proxy"))))
    found = probes(plan, None, "auto", 8)
    assert [(probe.transport, probe.pair) for probe in found] == [
        (name, "prefill-0 to decode-0") for name in ("shm", "mooncake", "nixl")
    ]
    assert found[0].argv()[-4:] == ["--cpus", "1", "--peer-cpus", "0"]


def test_each_end_of_a_transfer_gets_its_own_devices() -> None:
    from types import SimpleNamespace

    from pdctl.doctor.transfer import probes

    specs = [planned(role, role, rdma=(f"mlx5_{number}",)) for number, role in enumerate(("prefill", "decode"))]
    plan = cast(Plan, SimpleNamespace(processes=specs))
    [found] = probes(plan, "mooncake", "auto", 8)
    assert found.argv()[-4:] == ["--devices", "mlx5_1", "--peer-devices", "mlx5_0"]


def test_why_a_probe_failed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from pdctl.doctor.transfer import Probe, run

    script = "import sys; sys.stderr.write('the library said why'); print('{\"error\": \"the peer\"}')"
    monkeypatch.setattr(Probe, "argv", lambda _: [sys.executable, "-c", script])
    found = run(Probe(sys.executable, "nixl", "auto", 1))
    assert (found["error"], found["said"]) == ("the peer", "the library said why")


def test_the_backend_that_a_topology_needs_must_work() -> None:
    from pdctl.doctor.transfer import exit_code

    good = {"transport": "shm", "bytes_right": True, "fallback": ""}
    bad = {"transport": "mooncake", "error": "no"}
    assert exit_code([good, bad]) == 0
    assert exit_code([good, bad], "mooncake") == 2
    assert exit_code([{**good, "fallback": "tcp"}], "shm") == 1


def test_rates_of_links(bench: Bench) -> None:
    from pdctl.doctor.transfer import Probe, _link_gbps
    from pdctl.host.devices.rdma import read_tree

    tree = Tree(bench.folder / "sys")
    tree.hca("mlx5_0", {1: Port()})
    snapshot = read_tree(tree.root, bench.folder)
    probe = Probe(sys.executable, "mooncake", "rdma", 8)
    assert _link_gbps(probe, {"protocol": "rdma", "gbps": 40.0}, snapshot) == 50.0
    assert _link_gbps(probe, {"protocol": "tcp", "gbps": 40.0}, snapshot) is None


def test_what_may_still_work_is_told_and_not_refused(run: Run) -> None:
    """Without RDMA the service starts with TCP and reports it; a failing check does not prevent a start."""
    text = BASE.format(port=free_port(), protocol="rdma")
    run.write(text)
    done = run.cli("up", "-d")
    assert done.returncode == 0, done.stderr
    assert "warning: rdma: no RDMA modules are loaded" in done.stderr
    run.cli("down", check=True)


def test_a_topology_that_is_refused_is_told_of_in_every_area(bench: Bench) -> None:
    done = subprocess.run([sys.executable, "-m", "pdctl", "doctor", "net", "--against", "nowhere.toml"],
                          cwd=bench.folder, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 2
    assert "nowhere.toml does not exist" in done.stdout
