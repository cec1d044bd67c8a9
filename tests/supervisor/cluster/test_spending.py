"""What an agent knows of the spending of proxies: its own, their earlier starts, other nodes'."""

from __future__ import annotations

from pdctl.proxy_wire import KeySpent, SourceSpent, SpentReply
from pdctl.supervisor.cluster.spending import NodeSpent, Spending


def keys(requests: float, streams: float = 0.0) -> dict[str, KeySpent]:
    return {"k": KeySpent(requests, 0.0, streams, requests, 0.0)}


def test_an_agent_reports_its_proxies_and_their_last_start_without_its_answers() -> None:
    spending = Spending("a")
    spending.replied("proxy", SpentReply("e1", keys(5, 2)), 10.0)
    assert spending.report(10.5) == NodeSpent({"a/proxy@e1": SourceSpent(0.5, keys(5, 2))})
    spending.replied("proxy", SpentReply("e2", keys(1, 1)), 11.0)
    spending.replied("proxy", SpentReply("e2", keys(2, 1)), 12.0)
    assert spending.report(12.0) == NodeSpent(
        {"a/proxy@e1": SourceSpent(2.0, keys(5)), "a/proxy@e2": SourceSpent(0.0, keys(2, 1))}
    )
    spending.replied("proxy", SpentReply("e3", {}), 13.0)
    assert set(spending.report(13.0).sources) == {"a/proxy@e2", "a/proxy@e3"}
    assert spending.news(13.0).elsewhere == {}
    assert spending.news(13.0).here == spending.report(13.0).sources


def test_ages_add_up_over_nodes() -> None:
    spending = Spending("a")
    spending.heard("b", NodeSpent({"b/proxy@e1": SourceSpent(0.5, keys(5))}), 10.0)
    assert spending.news(11.0).elsewhere == {"b/proxy@e1": SourceSpent(1.5, keys(5))}
    assert spending.report(11.0) == NodeSpent({}), "what others said is not told on"
    spending.heard("b", NodeSpent({"b/proxy@e1": SourceSpent(0.25, keys(6))}), 12.0)
    assert spending.news(12.0).elsewhere == {"b/proxy@e1": SourceSpent(0.25, keys(6))}


def test_nodes_that_left_and_proxies_that_ended_long_ago_are_forgotten() -> None:
    spending = Spending("a")
    spending.heard("b", NodeSpent({"b/proxy@e1": SourceSpent(0.0, keys(5))}), 0.0)
    spending.heard("c", NodeSpent({"c/proxy@e1": SourceSpent(0.0, keys(5))}), 0.0)
    spending.replied("proxy", SpentReply("e1", keys(5)), 0.0)
    spending.keep_only(["c"], 1.0)
    assert set(spending.news(1.0).elsewhere) == {"c/proxy@e1"}
    spending.replied("proxy-1", SpentReply("e1", keys(5)), 3000.0)
    spending.keep_only(["c"], 3601.0)
    assert set(spending.report(3601.0).sources) == {"a/proxy-1@e1"}
