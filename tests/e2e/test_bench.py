"""`pdctl bench` with a real service, through its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import CLI, Run, Service, running, single, topology

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology()) as found:
        yield found


def bench(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    return service.run.cli("bench", "serve", *words, "--warm-up", "1")


def test_lengths_are_what_was_asked_for(service: Service, tmp_path: Path) -> None:
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    done = bench(service, "-n", "8", "--concurrency", "4", "--input", "20-60", "--output", "5-9", "--goodput",
                 "ttft:60000", "--out", str(out), "--html", str(page))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 answered, 0 failed, 0 truncated" in done.stdout
    assert "goodput" in done.stdout
    found = json.loads(out.read_text())
    assert (found["completed"], found["num_prompts"], found["model_id"]) == (8, 8, "m")
    assert all(20 <= size <= 60 for size in found["input_lens"])
    assert all(5 <= size <= 9 for size in found["output_lens"])
    # The prefill token and the others, each in its own event or merged with neighbours.
    assert all(len(gaps) < size for gaps, size in zip(found["itls"], found["output_lens"], strict=True))
    assert {"queue", "prefill", "ttft"} <= set(found["pdctl"]["parts_ms"])
    assert "<svg" in page.read_text()


def test_the_same_seed_gives_the_same_answers(service: Service) -> None:
    texts = [json.loads(bench(service, "-n", "3", "--output", "6", "--json", "--seed", "5").stdout) for _ in range(2)]
    assert texts[0]["generated_texts"] == texts[1]["generated_texts"]


def test_a_trace_and_a_comparison(service: Service, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    rows = "".join(f"2023-11-16 18:17:0{n}.0000000,{40 + n},{6 + n}\n" for n in range(4))
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    results = []
    for name in ("a", "b"):
        results.append(str(tmp_path / f"{name}.json"))
        done = bench(service, "--workload", "trace", "--data", str(trace), "--speed", "20", "--out", results[-1])
        assert done.returncode == 0, done.stderr
    assert json.loads(Path(results[0]).read_text())["input_lens"] == [40, 41, 42, 43]
    compared = service.run.cli("bench", "compare", *results)
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.splitlines()[0].split() == ["A", "B", "RATIO", "95%"]
    assert {"TTFT p50", "ITL p99"} <= {r["name"] for r in json.loads(
        service.run.cli("bench", "compare", *results, "--json").stdout)}  # fmt: skip


def test_ctrl_c_keeps_what_there_is(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    words = ["bench", "serve", "-n", "500", "--rate", "5", "--output", "4", "--warm-up", "0", "--out", str(out)]
    # Background jobs of a shell ignore SIGINT, and their children inherit this.
    with subprocess.Popen([*CLI, *words], env=service.run.env, cwd=service.run.folder, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if " done, " in line and not line.startswith("0 of"):
                break
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(30) == 0, said
    assert "interrupted: " in said
    found = json.loads(out.read_text())
    assert found["pdctl"]["interrupted"] is True
    assert 0 < found["completed"] < 500
    service.idle()


def test_ctrl_c_in_a_sweep_tells_the_rates_that_were_tried(service: Service) -> None:
    words = ["bench", "sweep", "--json", "--goodput", "ttft:60000", "--rate", "8", "--seconds", "1", "--input", "8",
             "--output", "2"]  # fmt: skip
    with subprocess.Popen([*CLI, *words], env=service.run.env, cwd=service.run.folder, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if "met their targets" in line:
                break
        process.send_signal(signal.SIGINT)
        said, told = process.stderr.read(), process.stdout.read()
        assert process.wait(30) == 130, said
    assert "interrupted" in said
    found = json.loads(told)
    assert found["tried"][0]["rate"] == 8
    assert found["notes"][-1] == "interrupted: the search is incomplete"
    service.idle()


BAD = {
    "rate": (["--rate", "0"], "--rate 0: must be greater than 0"),
    "length": (["--input", "-5"], "--input '-5' is not a length"),
    "target": (["--goodput", "ttft"], "--goodput 'ttft' is not a target"),
    "no data": (["--workload", "trace"], "needs --data FILE"),
    "no file": (["--workload", "file", "--data", "/none"], "cannot be read"),
    "nothing": (["-n", "0"], "there are no requests to send"),
    "ramp": (["--ramp-to", "5"], "--ramp-to needs --rate"),
    "unheeded": (["--prefix", "9"], "--prefix does nothing with --workload synthetic"),
    "steady": (["--burstiness", "2"], "--burstiness does nothing without --rate"),
    "bursts": (["--rate", "4", "--burstiness", "0.0001"], "--burstiness 0.0001: must be at least 0.01"),
    "endless": (["--rate", "4", "--burstiness", "inf"], "--burstiness inf: must be finite"),
    "model": (["--model", "other"], "no request was answered"),
    "place": (["-n", "1", "--output", "2", "--out", "/none/x.json"], "cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(service: Service, name: str) -> None:
    words, said = BAD[name]
    done = bench(service, *words, *([] if "-n" in words or "--workload" in words else ["-n", "2"]))
    assert done.returncode == 1, done.stdout
    assert said in done.stderr


def test_nobody_there(run: Run) -> None:
    done = run.cli("bench", "serve", "http://127.0.0.1:9", "-n", "1")
    assert done.returncode == 1
    assert "cannot reach http://127.0.0.1:9" in done.stderr
    assert "pdctl up" in done.stderr


@pytest.fixture(scope="module")
def fragile(module_run: Run) -> Iterator[Service]:
    """Two decode engines that may die any number of times."""
    run = Run(module_run.folder / "c")
    run.folder.mkdir()
    text = topology(prefills=1, decodes=2).replace("[supervisor]", "[supervisor]\nmax_restarts = 1000\nwithin_s = 1")
    with running(run, text) as found:
        yield found


CHAOS = ["bench", "chaos", "--streams", "4", "--prompts", "4", "--output", "24", "--json"]


def test_chaos_keeps_its_promises(fragile: Service) -> None:
    words = ["--for", "12", "--every", "4", "--fault", "kill:decode", "--fault", "freeze:decode", "--frozen", "1"]
    done = fragile.run.cli(*CHAOS, *words)
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found["faults"] >= 2
    assert (found["failed"], found["truncated"], found["wrong"], found["broken"]) == ({}, 0, 0, [])
    assert found["compared"] == found["answered"], "greedy answers are alike each time"
    assert found["tokens"] == {"lost": 0, "repeated": 0, "other": 0}
    assert 0 < found["ready_again_s"]["p100"] < 120
    assert found["answered"] >= 8
    assert found["leaked_block_s"] >= 0
    assert found["leak_looks"] > 10
    assert set(found["by_fault"]) <= {"kill decode", "freeze decode"}


def test_chaos_refuses_what_it_cannot_do(fragile: Service) -> None:
    for words, said in (
        (("--for", "5", "--every", "9"), "ends before the first fault"),
        (("--fault", "kill:nobody"), "groups: decode, prefill, proxy, supervisor"),
        (("--fault", "kill:supervisor"), "this service stops with its supervisor"),
    ):
        refused = fragile.run.cli("bench", "chaos", *words)
        assert refused.returncode == 1
        assert said in refused.stderr


def test_chaos_says_which_promise_broke(fragile: Service) -> None:
    """A killed proxy cuts its streams: pdctl does not promise otherwise, and the command reports it. Streams begin
    together, so one kill may come when all have just ended."""
    words = ["--for", "9", "--every", "3", "--output", "300", "--fault", "kill:proxy", "--prompts", "2"]
    cut = fragile.run.cli(*CHAOS, *words)
    assert cut.returncode == 1, cut.stdout
    assert json.loads(cut.stdout)["broken"]
    fragile.healthy()


def test_chaos_that_is_interrupted_breaks_nothing_more(fragile: Service) -> None:
    words = ["bench", "chaos", "--for", "120", "--every", "2", "--streams", "2", "--prompts", "2", "--output", "8",
             "--fault", "kill:decode", "--json"]  # fmt: skip
    with subprocess.Popen([*CLI, *words], env=fragile.run.env, cwd=fragile.run.folder, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("kill decode"):
                break
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=300)
    assert "interrupted; these are the results so far" in said
    found = json.loads(out)
    assert found["faults"] == 1
    fragile.healthy()


def test_a_sweep_ends_at_a_rate(service: Service) -> None:
    words = ["bench", "sweep", "--seconds", "1", "--output", "2"]
    done = service.run.cli(*words, "--goodput", "ttft:1000", "--rate", "20", "--input", "8", "--attainment", "0.5",
                           "--json", "--html", "s.html", "--png", "drawn")  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (service.run.folder / "s.html").read_text().count('class="frame"') == 4
    assert sorted(path.name for path in (service.run.folder / "drawn").iterdir()) == [
        "goodput.png", "met.png", "tpot.png", "ttft.png",
    ]  # fmt: skip
    held = [row["rate"] for row in found["tried"] if row["attainment"] >= 0.5]
    assert found["highest_rate"] == max(held)
    assert found["engines"] == 2
    assert len(held) < len(found["tried"]), "it ends above a rate that broke"
    missed = service.run.cli(*words, "--goodput", "ttft:0.01", "--rate", "200")
    assert missed.returncode == 1
    assert "at no rate did 90% meet their targets" in missed.stderr


def test_transfers_by_size_and_number_of_blocks(run: Run) -> None:
    words = ["bench", "transfer", "--transport", "shm", "--mib", "1", "--mib", "4", "--blocks", "1", "--blocks", "64"]
    done = run.cli(*words, "--json", "--html", "t.html", "--png", "png")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(entry["mib"], entry["bytes_right"]) for entry in found] == [(1, True), (4, True)]
    assert [(cut["count"], cut["bytes_each"]) for entry in found for cut in entry["pieces"]] == [
        (1, 2**20), (64, 2**14), (1, 2**22), (64, 2**16),
    ]  # fmt: skip
    for entry in found:
        for cut in entry["pieces"]:
            assert cut["gbps"] == pytest.approx(entry["mib"] * 2**20 / cut["ms"] / 1e6, rel=0.1)
    assert (run.folder / "t.html").read_text().count('class="frame"') == 3
    for name in ("size", "latency", "blocks"):
        assert (run.folder / "png" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = run.cli(*words).stdout.splitlines()
    assert [line.split()[:5] for line in lines[1:]] == [
        ["shm", "shm", "1", "1", "1024"], ["shm", "shm", "1", "64", "16"],
        ["shm", "shm", "4", "1", "4096"], ["shm", "shm", "4", "64", "64"],
    ]  # fmt: skip
    bad = run.cli("bench", "transfer", "--transport", "pigeon")
    assert bad.returncode == 1
    assert "one of: cuda_ipc, shm, mooncake, nixl" in bad.stderr
    none = run.cli("bench", "transfer", "--transport", "mooncake", "--protocol", "rdma", "--mib", "1")
    assert none.returncode == 1, "there is no RDMA here"
    assert "mooncake, 1 MiB: FALLBACK to tcp: RDMA is configured" in none.stderr


@pytest.mark.slow
def test_chaos_with_supervisors_that_die(run: Run) -> None:
    text = single().replace("[supervisor]", '[supervisor]\non_supervisor_death = "survive"')
    with running(run, text) as service:
        before = {process.name: process.pid for process in service.engines()}
        done = run.cli("bench", "chaos", "--for", "9", "--every", "4", "--streams", "2", "--prompts", "2", "--output",
                       "24", "--fault", "kill:supervisor", "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert set(found["by_fault"]) == {"kill supervisor"}
        assert (found["failed"], found["wrong"], found["broken"]) == ({}, 0, [])
        assert {process.name: process.pid for process in service.engines()} == before, "engines lived on"


def topology_named(name: str, text: str) -> str:
    return text.replace('name = "t"', f'name = "{name}"')


def test_two_topologies_are_compared_in_turn(run: Run, tmp_path: Path) -> None:
    for name in ("pd", "one"):
        run.write(topology_named(name, single()), f"{name}.toml")
    words = ["bench", "compare", "pd.toml", "one.toml", "--rounds", "2", "-n", "6", "--concurrency", "2", "--input",
             "40", "--output", "8", "--goodput", "ttft:60000"]  # fmt: skip
    done = run.cli(*words, "--html", "c.html", "--out", "kept")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("round")] == [
        "round 1 of 2: pd.toml", "round 1 of 2: one.toml", "round 2 of 2: one.toml", "round 2 of 2: pd.toml",
    ]  # fmt: skip
    assert done.stdout.split()[:3] == ["PD", "ONE", "RATIO"]
    assert "request goodput" in done.stdout
    kept = json.loads((run.folder / "kept/pd.json").read_text())
    assert kept["completed"] == 12
    assert kept["pdctl"]["repeats"]["count"] == 2
    assert "pd vs. one" in (run.folder / "c.html").read_text()
    assert not run.processes()
    again = run.cli("bench", "compare", "kept/pd.json", "kept/one.json", "--json")
    assert {entry["name"] for entry in json.loads(again.stdout)} >= {"ITL p99", "TTFT p99", "request throughput"}


def test_comparisons_that_make_no_sense(run: Run) -> None:
    run.write("", "a.toml")
    run.write("{}", "b.json")
    for words, said in (
        (["a.toml", "b.json"], "are of different kinds"),
        (["b.json", "b.json", "--rate", "3"], "--rate works only with topologies"),
        (["a.toml", "none.toml"], "does not exist"),
        (["a.toml", "a.toml", "--rate", "-1"], "--rate -1: must be greater than 0"),
        (["b.json", "b.json"], "contains no samples"),
    ):
        done = run.cli("bench", "compare", *words)
        assert done.returncode == 1
        assert said in done.stderr


def test_a_comparison_that_is_interrupted_leaves_nothing(run: Run) -> None:
    for name in ("pd", "one"):
        run.write(topology_named(name, single()), f"{name}.toml")
    words = ["bench", "compare", "pd.toml", "one.toml", "-n", "500", "--rate", "2", "--output", "4", "--warm-up", "0"]
    for wanted in ("round 1 of 3: pd.toml", " done, "):
        with subprocess.Popen([*CLI, *words], env=run.env, cwd=run.folder, text=True, stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, start_new_session=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:  # fmt: skip
            assert process.stderr is not None
            for line in process.stderr:
                if wanted in line:
                    break
            # As a terminal does: to the whole process group.
            os.killpg(process.pid, signal.SIGINT)
            process.stderr.read()
            assert process.wait(60) == 130
        assert not run.processes()


def test_repeats_and_what_engines_did(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    done = bench(service, "-n", "4", "--repeats", "3", "--output", "200", "--concurrency", "4", "--out", str(out),
                 "--html", str(tmp_path / "r.html"), "--png", str(tmp_path / "png"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "OVER 3 RUNS" in done.stdout
    ours = json.loads(out.read_text())["pdctl"]
    assert ours["repeats"]["low"]["request_throughput"] < ours["repeats"]["mean"]["request_throughput"]
    engines = ours["engines"]["engines"]
    assert set(engines) == {"prefill-0", "decode-0"}
    assert max(value for value in engines["decode-0"]["running"] if value is not None) >= 1
    assert "Requests running, by engine" in (tmp_path / "r.html").read_text()
    assert {tuple(place[:2]) for place in ours["placed"]} == {("prefill-0", "decode-0")}
    assert "Requests on each engine" in (tmp_path / "r.html").read_text()
    for name in ("ttft", "itl", "e2e", "requests", "running", "kv_used", "leases"):
        assert (tmp_path / "png" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_latency_model(service: Service) -> None:
    run = service.run
    service.complete("a few steps", max_tokens=8)
    own = run.cli("bench", "profile", "--png", "png")
    assert own.returncode == 0, own.stderr
    assert {line.split()[0] for line in own.stdout.partition("ENGINE")[2].splitlines()[1:]} == {"prefill-0", "decode-0"}
    assert {path.name for path in (run.folder / "png").iterdir()} >= {"prefill.png", "decode.png"}
    done = run.cli("bench", "profile", "--measure", "--longest", "128", "--widest", "4", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout
    planned = run.cli("plan").stdout
    assert "from the profile of" in planned
    assert "first token, by prompt length" in planned
    found = json.loads((run.folder / "s/t/profile.json").read_text())
    assert found["prefill"]["points"] == [10, 6]
    assert all(value >= 0 for value in found["prefill"]["coefficients"] + found["decode"]["coefficients"])
