"""Joins the metrics of several engines into one Prometheus text. Pure.

The format (version 0.0.4, https://prometheus.io/docs/instrumenting/exposition_formats/) wants all samples of a family
in one group, so samples are collected by family. Each sample gets the label `engine`; an engine's own label of that
name, which vLLM has, becomes `exported_engine`, as Prometheus itself renames it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*"'
_VALUE = r"[+-]?(?:[0-9.]+(?:[eE][+-]?[0-9]+)?|[Ii]nf|NaN)(?: -?[0-9]+)?"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{((?:{_LABEL},? ?)*)\}})? ({_VALUE})")
_ABOUT = re.compile(rf"# (HELP|TYPE) ({_NAME}) ?(.*)")
# What follows a family's name in the names of its samples.
_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count", "_created")


@dataclass(slots=True)
class _Family:
    about: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


class Joined:
    """The families of all engines so far. Lines that are no metrics are left out."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}
        self._current: dict[str, str] = {}

    def add(self, engine: str, lines: Iterable[str]) -> None:
        """Add lines of one engine's metrics. They may come in several parts, in their order."""
        label = f'engine="{_escaped(engine)}"'
        for line in lines:
            if line.startswith("#"):
                self._describe(engine, line)
            elif found := _SAMPLE.fullmatch(line.rstrip("\r")):
                name, labels, value = found.groups()
                labels = _renamed(labels.rstrip(", ")) if labels else ""
                family = self._families.setdefault(self._family_of(engine, name), _Family())
                family.samples.append(f"{name}{{{label}{',' if labels else ''}{labels}}} {value}\n")

    def text(self) -> bytes:
        """All families that have samples."""
        parts: list[str] = []
        for name, family in self._families.items():
            if family.samples:
                parts += [f"# {what} {name} {text}\n" for what, text in family.about.items()]
                parts += family.samples
        return "".join(parts).encode()

    def _describe(self, engine: str, line: str) -> None:
        if found := _ABOUT.fullmatch(line.rstrip("\r")):
            what, name, text = found.groups()
            self._current[engine] = name
            self._families.setdefault(name, _Family()).about.setdefault(what, text)

    def _family_of(self, engine: str, name: str) -> str:
        current = self._current.get(engine, "")
        return current if current and name.removeprefix(current) in _SUFFIXES else name


def _renamed(labels: str) -> str:
    """The labels with `engine` renamed. Values stay as they are."""
    if "engine=" not in labels:
        return labels
    pairs = re.findall(_LABEL, labels)
    return ",".join(f"exported_{pair}" if pair.startswith("engine=") else pair for pair in pairs)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
