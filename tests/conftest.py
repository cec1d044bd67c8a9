"""Checks that every test leaves no processes, descriptors or ports behind."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from tests.service import Run, temporary_run

# scripts/demo tells users to export this, but tests have their own services.
os.environ.pop("PDCTL_FILE", None)
# Some tests press Ctrl-C. A shell without job control starts what runs in the background with these ignored, and
# children would inherit that.
for _ignored in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_ignored) is signal.SIG_IGN:
        signal.signal(_ignored, signal.default_int_handler if _ignored is signal.SIGINT else signal.SIG_DFL)
# As in an engine. OpenMP's threads wait for each other by spinning: on a busy machine, two take six times as long.
os.environ["OMP_NUM_THREADS"] = "1"


# Files that take minutes, longest first: if started last, one of them would run alone at the end.
_LONG = (
    "test_documented_commands", "test_cluster", "test_takeover", "test_parallel", "test_ranks",
    "test_tool_calls", "test_lmdeploy", "test_supervision", "test_sglang", "test_bench", "test_kv", "test_cli",
    "test_parity", "test_families", "test_death", "test_chaos", "test_lost_files", "test_locked_service",
    "test_children", "test_clients", "test_cluster",
    "test_transfer", "test_proxy", "test_open_engines", "test_other_apis", "test_processes", "test_stores",
    "test_routers", "test_planted_faults", "test_fields", "test_schemas", "test_http", "test_api",
)  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    """What `pytest.mark.anyio` runs asynchronous tests with."""
    return "asyncio"


# The duration of an example depends on the machine and its load.
settings.register_profile("pdctl", deadline=None)
settings.load_profile("pdctl")


# Tests that say again, in other circumstances, what a quicker one says, and take 15 to 60 s each: `scripts/slow`.
_SLOW = (
    "test_cluster.py::test_every_promise_holds[power]", "test_cluster.py::test_every_promise_holds[cut]",
    "test_parallel.py::test_answers_survive_the_death_of_a_rank",
    "test_takeover.py::test_planted_faults_are_found[socket-first]",
    "test_ranks.py::test_a_rank_that_stands_still_is_given_up[ranks]",
    "test_ranks.py::test_a_rank_that_stands_still_is_given_up[stages]",
    "test_ranks.py::test_a_rank_that_stands_still_is_given_up[stripes]",
    "test_ranks.py::test_a_rank_that_is_killed_ends_the_steps_with_its_reason[stages]",
    "test_ranks.py::test_a_rank_that_is_killed_ends_the_steps_with_its_reason[stripes]",
    "test_parity.py::test_gemma_equals_generate[lengths0-8]",
    "test_inline.py::test_a_busy_prefill_engine_is_avoided_and_no_token_changes",
    "test_bench.py::test_a_sweep_ends_at_a_rate", "test_bench.py::test_two_topologies_are_compared_in_turn",
    "test_tool_calls.py::test_calls_of_a_family[llama3]", "test_tool_calls.py::test_calls_of_a_family[qwen3_coder]",
    "test_tool_calls.py::test_the_parsers_can_be_chosen",
    "test_keys.py::test_shares_of_keys", "test_keys.py::test_a_full_queue_has_room_for_a_key_with_less",
    "test_migration.py::test_a_stream_moves_at_a_drain_and_no_token_changes[log probabilities]",
    "test_migration.py::test_a_stream_moves_at_a_drain_and_no_token_changes[greedy]",
    "test_lmdeploy.py::test_prompts_never_need_more_kv_than_prefill_has[real]",
    "test_lmdeploy.py::test_an_error_is_an_error_whatever_its_status_was[busy]",
    "test_locked_service.py::test_the_other_bench_verbs", "test_stores.py::test_a_killed_store_costs_no_answer",
    "test_cluster.py::test_every_promise_holds[quorum]",
    "test_supervision.py::test_apply_under_load_touches_only_what_changed",
    "test_supervision.py::test_a_drain_waits_for_what_cannot_move",
    "test_supervision.py::test_settings_that_need_another_proxy_process",
    "test_supervision.py::test_four_kills_of_the_proxy_refuse_nobody",
    "test_inline.py::test_a_decode_engine_that_dies_with_an_inline_request_loses_nothing",
    "test_bench.py::test_repeats_and_what_engines_did",
    "test_bench.py::test_a_comparison_that_is_interrupted_leaves_nothing",
    "test_migration.py::test_a_drained_restart_under_load_does_not_wait_for_long_answers",
    "test_kv.py::test_network_transports_carry_the_same_tokens[mooncake]",
    "test_kv.py::test_block_sizes_may_differ[5-7]",
    "test_death.py::test_stream_survives_the_death_of_both_engines_at_once",
    "test_death.py::test_seeded_stream_survives_too",
    "test_death.py::test_engines_killed_together_have_not_died_of_a_request",
    "test_roles.py::test_random_changes_under_streams_lose_nothing",
    "test_tool_calls.py::test_calls_of_mistral",
    "test_other_apis.py::test_a_death_in_the_middle_of_a_response",
    "test_lost_files.py::test_down_ends_what_does_not_answer[True]",
    "test_keys.py::test_limits_of_keys[2]",
    "test_ahead.py::test_a_stream_goes_on_after_a_death[options1]",
    "test_speculation.py::test_a_stream_goes_on_after_a_death[options1]",
    "test_top.py::test_a_service_that_stops_meanwhile",
    "test_parity.py::test_tiny_equals_generate[1H]",
    "test_lmdeploy.py::test_an_error_is_an_error_whatever_its_status_was[error200]",
    "test_lmdeploy.py::test_m_many_pairs_are_linked_once_each",
    "test_lmdeploy.py::test_l_an_engine_that_is_removed_is_unlinked",
    "test_lmdeploy.py::test_answers_are_right_and_nothing_is_left_in_every_style_of_ids[uuid]",
    "test_lmdeploy.py::test_answers_are_right_and_nothing_is_left_in_every_style_of_ids[neg1]",
    "test_cli.py::test_a_full_disk_under_its_log_does_not_end_the_service", "test_cli.py::test_a_second_ctrl_c_forces",
    "test_death.py::test_stream_leaves_a_frozen_engine",
    "test_supervision.py::test_a_stale_run_directory_of_another_boot_is_no_obstacle",
    "test_supervision.py::test_down_ends_what_a_killed_supervisor_left",
    "test_inline.py::test_off_by_a_key", "test_bench.py::test_the_latency_model",
    "test_bench.py::test_chaos_that_is_interrupted_breaks_nothing_more",
    "test_families.py::test_every_way_to_run_gives_the_same_tokens[gpt_oss]",
    "test_dash.py::test_the_link", "test_lost_files.py::test_why_knows_exits_that_could_not_be_written",
    "test_lost_files.py::test_relative_directories_mean_the_same_to_every_process",
    "test_prefix.py::test_deterministic_engines_find_whole_segments_on_both_sides",
    "test_roles.py::test_the_role_stays_over_restarts_and_applies",
    "test_transfer.py::test_a_peer_killed_during_a_read_ends_it[cuda_ipc]",
    "test_transfer.py::test_a_frozen_peer_does_not_freeze_us_and_nothing_lands_after_it_is_settled[cuda_ipc]",
    "test_cluster.py::test_every_promise_holds[look]",
    "test_top.py::test_a_crash_keys_and_two_sizes",
    "test_elastic.py::test_advice_changes_nothing_and_says_what_it_would_do",
    "test_dash.py::test_a_stream_that_met_a_death",
    "test_families.py::test_every_way_to_run_gives_the_same_tokens[gemma3_text]",
    "test_bench.py::test_lengths_are_what_was_asked_for", "test_bench.py::test_chaos_keeps_its_promises",
    "test_metrics.py::test_prometheus_and_the_boards_beside_a_service",
    "test_clients.py::test_log_probabilities[200]", "test_clients.py::test_structured_output[100]",
    "test_supervision.py::test_another_users_service_is_left_alone",
    "test_other_apis.py::test_a_death_in_the_middle_of_a_message[True]",
    "test_ranks.py::test_ranks_answer_as_one_process_does[4]",
    "test_transfer.py::test_a_peer_killed_during_a_read_ends_it[nixl]",
    "test_transfer.py::test_a_frozen_peer_does_not_freeze_us_and_nothing_lands_after_it_is_settled[nixl]",
    "test_ahead.py::test_a_stream_goes_on_after_a_death[options0]",
    "test_locked_service.py::test_the_other_verbs[restart decode-0 --drain]",
    "test_lost_files.py::test_a_removed_run_directory_comes_back",
    "test_sglang.py::test_a_pair_that_never_meets_is_called_again",
    "test_engines.py::test_kv_crosses_hosts_and_tokens_are_those_of_one[nixl-nixl]",
    "test_http.py::test_lists_of_one_key_do_not_hold_up_another_key",
    "test_death.py::test_idle_process_is_restarted_and_says_why[decode-0]",
    "test_parallel.py::test_engines_of_any_width_answer_as_one_process[P 1 x 2 stages -> D 1, blocks 16 -> 16, shm]",
    "test_parallel.py::test_engines_of_any_width_answer_as_one_process[P 2 stripes -> D 1, blocks 16 -> 16, shm]",
    "test_ranks.py::test_stages_answer_as_one_process_does[2]",
    "test_ranks.py::test_stripes_answer_as_one_process_does[3]",
    "test_upgrade.py::test_a_version_that_does_not_start_changes_nothing",
    "test_upgrade.py::test_an_upgrade_under_load_cuts_nothing",
    "test_cluster.py::test_every_promise_holds[agent]",
    "test_ahead.py::test_answers_are_those_of_generate",
    "test_tool_calls.py::test_a_death_in_the_middle_of_a_call_changes_nothing[prefill-0]",
    "test_other_apis.py::test_structured_output_of_a_response[100]",
    "test_traces.py::test_a_request_that_met_a_decode_death",
    "test_lmdeploy.py::test_b_a_pair_that_cannot_be_linked_is_not_used_until_it_can[p2p_connect]",
    "test_lmdeploy.py::test_answers_are_right_and_nothing_is_left_in_every_style_of_ids[real]",
    "test_lmdeploy.py::test_f_a_stream_that_cannot_continue_ends_with_an_error[die_mid_stream]",
    "test_lmdeploy.py::test_f_a_stream_that_cannot_continue_ends_with_an_error[abort_mid_stream]",
    "test_stores.py::test_the_metadata_service_is_started_if_wanted",
    "test_stores.py::test_a_changed_store_restarts_what_uses_it",
    "test_proxy.py::test_a_stream_cut_within_a_character_goes_on_and_stays_one_answer[False]",
    "test_death.py::test_stream_survives_the_death_of_an_engine[core-prefill-0]",
    "test_dash.py::test_a_restart_by_a_button",
    "test_takeover.py::test_apply_of_a_setting_that_needs_another_process_cuts_nothing",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order long files first; xdist distributes files in this order. Mark slow tests before they are chosen."""
    for item in items:
        if item.nodeid.endswith(_SLOW):
            item.add_marker(pytest.mark.slow)
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_LONG)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all modules and tests again and again: a seventh of all time."""
    gc.collect()
    gc.freeze()


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:
            continue
    return found


def _children() -> set[int]:
    """Pids of all descendants, from the kernel's child lists: scanning all processes takes 20 ms per test."""
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                new = set(map(int, task.read_text().split())) - found
            except OSError:
                continue
            found |= new
            waiting += new
    return found


def _running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _listening() -> set[str]:
    """Inodes of this process's listening sockets."""
    listening = {
        f"socket:[{words[9]}]"
        for table in ("tcp", "tcp6")
        if (path := Path("/proc/self/net") / table).exists()
        for words in map(str.split, path.read_text().splitlines()[1:])
        if words[3] == "0A"
    }
    return listening & set(_descriptors().values())


def _left(children: set[int], descriptors: dict[int, str], listening: set[str]) -> str:
    """A description of what exists now but did not before."""
    new = {pid for pid in _children() - children if _running(pid)}
    kinds = ("socket:", "/memfd:pdctl", "anon_inode:[pidfd]")
    leaked = {fd: name for fd, name in _descriptors().items() if fd not in descriptors and name.startswith(kinds)}
    ports = _listening() - listening
    kinds_left = (("processes", new), ("descriptors", leaked), ("listening sockets", ports))
    return " and ".join(f"{what} {found}" for what, found in kinds_left if found)


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaks a child process, a socket, a memory file or a listening port."""
    before = (_children(), _descriptors(), _listening())
    yield
    if {"service", "fragile", "ours", "quiet", "torn_group", "store_master"} & set(request.fixturenames):
        # What a module shares is checked when the module ends: services by `running`, transports by a test. Mooncake's
        # client of a store keeps sockets until its process ends.
        return
    if _left(*before):
        # Uncollected garbage is not a leak; collecting after every test would take most of the suite's time.
        gc.collect()
    assert not (left := _left(*before)), f"leaked {left}"


@pytest.fixture
def run() -> Iterator[Run]:
    """A directory for one test's service; a process that is still running at the end is a failure."""
    with temporary_run() as made:
        yield made


@pytest.fixture(scope="module")
def module_run() -> Iterator[Run]:
    """The same for a module."""
    with temporary_run() as made:
        yield made


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The tiny sample's directory, created if it is missing."""
    from pdctl.engine.samples.prepare import prepare
    from pdctl.host.models import locate_model
    from pdctl.host.users import cache_root

    located = locate_model("sample:tiny-qwen3", cache_root())
    return Path(prepare(located.spec, located.path, lambda what, fraction: None))
