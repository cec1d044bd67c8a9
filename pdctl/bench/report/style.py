"""Colours and layout of report pages, for light and dark screens, from the width of a phone to that of a desk."""

from __future__ import annotations

# Each colour by its name in CSS. Text has a contrast of at least 4.5 to its background, lines and bars one of at least
# 3 (WCAG 2.2 AA, 1.4.3 and 1.4.11); a test computes them.
LIGHT = {
    "page": "#ffffff", "text": "#1c2024", "faint": "#5b6570", "rule": "#d9dee3", "grid": "#e6eaee", "axis": "#7a8591",
    "head": "#f4f6f8", "warn": "#fff3cd", "warn-edge": "#b4531a", "best": "#0b6b3a", "wait": "#7fa9bf",
    "c0": "#0b6e99", "c1": "#b4531a", "c2": "#3d7a3d", "c3": "#7a3d8a", "c4": "#806300", "c5": "#b0325f",
    "c6": "#4a5568", "c7": "#00766a",
}  # fmt: skip
DARK = {
    "page": "#14181d", "text": "#e6e9ec", "faint": "#a3adb8", "rule": "#333b44", "grid": "#262d35", "axis": "#7d8894",
    "head": "#1c2229", "warn": "#3a2f12", "warn-edge": "#e58b4f", "best": "#6fd09a", "wait": "#4f7d94",
    "c0": "#58b7e0", "c1": "#f0955a", "c2": "#7cc47c", "c3": "#c99adb", "c4": "#d9b53f", "c5": "#f07fa8",
    "c6": "#a9b4c4", "c7": "#4fc4b5",
}  # fmt: skip
SERIES = 8
# Lines differ in more than their colour.
DASHES = ("", "8 4", "2 4", "12 4 2 4", "6 3 2 3 2 3", "16 5", "4 6", "1 5")


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    f"@media print{{:root{{{_variables(LIGHT)}}}}}"
    "*{box-sizing:border-box}"
    "body{font:16px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif;margin:0;color:var(--text);"
    "background:var(--page)}"
    "main{max-width:84rem;margin:0 auto;padding:1rem 1.25rem 3rem}"
    "h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 .25rem}"
    "h2{font-size:1.05rem;line-height:1.3;margin:0 0 .5rem}"
    "p{margin:.25rem 0 1rem;max-width:60rem}.faint{color:var(--faint)}"
    ".warn{background:var(--warn);padding:.5rem .75rem;border-left:4px solid var(--warn-edge)}"
    ".scroll{overflow-x:auto;margin:0 0 1.5rem}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    ".scroll>table{min-width:min(100%,36rem)}"
    "th,td{text-align:right;padding:.3rem .75rem;border-bottom:1px solid var(--rule);white-space:nowrap}"
    "th{font-weight:600;background:var(--head)}"
    "th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--page)}"
    "th:first-child{background:var(--head)}.best{color:var(--best);font-weight:600}"
    # Words in the last column may need two lines.
    ".dense{font-size:.85rem}.dense th,.dense td{padding:.3rem .5rem}.dense td:last-child{white-space:normal}"
    # Two columns when there is room for both.
    ".plots{display:grid;grid-template-columns:minmax(0,1fr);gap:1.75rem 2.5rem;margin-top:1.5rem}"
    "@media(min-width:64rem){.plots{grid-template-columns:repeat(2,minmax(0,1fr))}}"
    "section{min-width:0;break-inside:avoid}"
    # A plot: lines are stretched to the frame, text is not.
    ".plot{margin:0;font-size:.8rem;line-height:1.2;color:var(--faint)}"
    ".frame{position:relative;height:15rem;margin:0 .75rem 3.1rem 3.6rem}"
    ".named .frame{margin-left:7rem}"
    ".frame svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}"
    ".x,.y,.m,.xt{position:absolute;white-space:nowrap}"
    ".x{top:100%;transform:translateX(-50%);padding-top:.35rem}"
    ".y{right:100%;transform:translateY(50%);padding-right:.5rem;max-width:6.8rem;overflow:hidden;"
    "text-overflow:ellipsis}"
    ".xt{top:100%;left:0;right:0;text-align:center;padding-top:1.65rem}"
    ".yt{margin:0 0 1.5rem}"
    ".m{color:var(--text);background:color-mix(in srgb,var(--page) 82%,transparent);padding:0 .2rem;border-radius:2px}"
    ".grid{stroke:var(--grid)}.axis{stroke:var(--axis)}.mark{stroke:var(--axis);stroke-dasharray:3 4}"
    ".grid,.axis,.mark,.line,.dot{vector-effect:non-scaling-stroke;fill:none}"
    ".line{stroke-width:2}.dot{stroke-width:8;stroke-linecap:round}.ring{stroke:var(--page);stroke-width:11;"
    "stroke-linecap:round;vector-effect:non-scaling-stroke}"
    ".wait{fill:var(--wait)}"
    + "".join(
        f".s{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n})}}"
        + (f".line.s{n}{{stroke-dasharray:{dash}}}" if dash else "")
        for n, dash in enumerate(DASHES)
    )
    + ".legend{font-size:.85rem;color:var(--text);margin:.25rem 0 0;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;"
    "padding:0;list-style:none}"
    "table.legend{display:table}table.legend th,table.legend td{padding:.15rem .75rem .15rem 0;border:0;"
    "background:none;position:static}"
    ".key{width:2.2rem;height:.8rem;vertical-align:middle;margin-right:.5rem}"
    "@media(max-width:40rem){main{padding:.75rem .9rem 2rem}.frame{height:12.5rem;margin-left:2.9rem}"
    ".named .frame{margin-left:5.2rem}.y{max-width:5rem}th,td{padding:.3rem .5rem}"
    # Every second tick: numbers must not touch.
    ".many:nth-of-type(even){display:none}}"
)
