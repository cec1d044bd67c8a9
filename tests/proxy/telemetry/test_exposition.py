"""Metrics of several engines in one text: as Prometheus reads it, with nothing lost and nothing joined that differs."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pdctl.proxy.telemetry.exposition import Joined

Samples = set[tuple[str, tuple[tuple[str, str], ...], float]]


def joined(**texts: str) -> str:
    found = Joined()
    for engine, text in texts.items():
        found.add(engine, text.split("\n"))
    return found.text().decode()


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_family_is_one_group_with_one_heading() -> None:
    text = "# HELP a_total A\n# TYPE a_total counter\na_total 1\n# HELP b B\n# TYPE b gauge\nb 2\n"
    assert joined(x=text, y=text) == (
        '# HELP a_total A\n# TYPE a_total counter\na_total{engine="x"} 1\na_total{engine="y"} 1\n'
        '# HELP b B\n# TYPE b gauge\nb{engine="x"} 2\nb{engine="y"} 2\n'
    )


def test_an_engines_own_label_of_that_name_is_kept_under_another() -> None:
    text = 'vllm:n{engine="0",model_name="a,engine=\\"b\\""} 1\nother{engineer="0"} 2\n'
    assert joined(d=text) == (
        'vllm:n{engine="d",exported_engine="0",model_name="a,engine=\\"b\\""} 1\nother{engine="d",engineer="0"} 2\n'
    )


def test_lines_that_are_no_metrics_are_left_out() -> None:
    text = '<html>\n\n# EOF\n# a comment\nno value\nbad{x=1} 1\nbad{x="1} 1\n1name 2\ngood{x="}"} NaN 123\n'
    assert joined(e=text) == 'good{engine="e",x="}"} NaN 123\n'


_LABEL = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=30)
@given(st.lists(st.tuples(_LABEL, _LABEL, st.floats(allow_nan=False)), min_size=1, max_size=5), st.data())
def test_all_samples_of_all_engines_are_there(drawn: list[tuple[str, str, float]], data: Any) -> None:
    """Whatever the labels contain, and in however many parts the lines come."""
    found, expected = Joined(), set()
    for engine in ("one", 'two"\\'):
        registry = CollectorRegistry()
        gauge = Gauge("pdctl_g", "A gauge", ["engine", "b"], registry=registry)
        counter = Counter("pdctl_c", "A \n counter", ["b"], registry=registry)
        histogram = Histogram("pdctl_h", "h", registry=registry)
        for a, b, value in drawn:
            gauge.labels(a, b).set(value)
            counter.labels(b).inc(abs(value))
            histogram.observe(value)
        text = generate_latest(registry).decode()
        lines = text.split("\n")
        cut = data.draw(st.integers(0, len(lines)))
        found.add(engine, lines[:cut])
        found.add(engine, lines[cut:])
        for name, labels, value in samples(text):
            renamed = {("exported_engine" if key == "engine" else key): label for key, label in labels}
            expected.add((name, tuple(sorted({**renamed, "engine": engine}.items())), value))
    assert samples(found.text().decode()) == expected
