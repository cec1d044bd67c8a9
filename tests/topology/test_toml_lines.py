from __future__ import annotations

from pathlib import Path

from pdctl.topology.toml_lines import key_lines

TEXT = '''top = 1
[a]
x = [
  1,   # y = 2
  2,
]
"quoted key" = 3
s = """
z = 4
[not.a.table]
"""
[[b]]
k = { inline = 1 }
[[b]]
k.deep = 2
after = "[["
last = 1
'''


def test_keys_are_found_where_they_stand() -> None:
    found = key_lines(TEXT)
    assert found[("top",)] == 1
    assert found[("a",)] == 2
    assert found[("a", "x")] == 3
    assert found[("a", "quoted key")] == 7
    assert found[("a", "s")] == 8
    assert found[("b", 0)] == 12
    assert found[("b", 0, "k")] == 13
    assert found[("b", 1)] == 14
    assert found[("b", 1, "k", "deep")] == 15
    assert found[("b", 1, "last")] == 17
    assert not any("z" in path or "y" in path for path in found)


def test_every_key_of_the_example_is_found() -> None:
    import tomli

    text = (Path(__file__).parents[2] / "pdctl.toml.example").read_text()
    found = key_lines(text)
    lines = text.splitlines()
    for table, values in tomli.loads(text).items():
        rows = [((table, n), row) for n, row in enumerate(values)] if isinstance(values, list) else [((table,), values)]
        for path, row in rows:
            for key in row:
                assert lines[found[(*path, key)] - 1].startswith(f"{key} =")
