from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.cache import prefix
from pdctl.wire import LayerShape, Manifest

MANIFEST = Manifest("m", "float32", 16, [LayerShape(2, 8, 8)])


def name(manifest: Manifest, salt: str, *blocks: list[int], secret: str = "s") -> bytes:
    found = prefix.salted(prefix.root(manifest, secret), salt)
    for tokens in blocks:
        found = prefix.following(found, tokens)
    return found


def test_equal_content_has_one_name_on_every_engine() -> None:
    other = Manifest("m", "float32", 16, [LayerShape(2, 8, 8)])
    assert name(MANIFEST, "t", [1, 2], [3, 4]) == name(other, "t", [1, 2], [3, 4])


def test_whatever_decides_on_the_content_changes_the_name() -> None:
    others = [
        name(Manifest("n", "float32", 16, MANIFEST.layers), "t", [1, 2], [3, 4]),
        name(Manifest("m", "bfloat16", 16, MANIFEST.layers), "t", [1, 2], [3, 4]),
        name(Manifest("m", "float32", 32, MANIFEST.layers), "t", [1, 2], [3, 4]),
        name(Manifest("m", "float32", 16, [LayerShape(4, 8, 8)]), "t", [1, 2], [3, 4]),
        name(MANIFEST, "u", [1, 2], [3, 4]),
        name(MANIFEST, "", [1, 2], [3, 4]),
        name(MANIFEST, "t", [2, 1], [3, 4]),
        name(MANIFEST, "t", [1, 2]),
        name(MANIFEST, "t", [1, 2], [3, 4], secret="other"),
        name(MANIFEST, "t", [1, 2], [3, 4], secret=""),
    ]
    assert len({name(MANIFEST, "t", [1, 2], [3, 4]), *others}) == len(others) + 1


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=20), st.integers(0, 19), st.integers(1, 2**20))
def test_one_other_token_is_another_name(tokens: list[int], index: int, by: int) -> None:
    changed = list(tokens)
    changed[index % len(tokens)] += by
    assert name(MANIFEST, "", tokens) != name(MANIFEST, "", changed)


@pytest.mark.parametrize(
    ("tenant", "chosen"), [("", None), ("k1", None), ("", "mine"), ("k1", "mine"), ("k1", '"],["')]
)
def test_a_salt_says_whose_it_is(tenant: str, chosen: str | None) -> None:
    assert prefix.tenant_of(prefix.salt_of(tenant, chosen)) == tenant
    assert (prefix.salt_of(tenant, chosen) == "") == (not tenant and not chosen)


@pytest.mark.parametrize("salt", ["x", "[", '["a"]', '{"a": 1}', "[1, 2]"])
def test_a_salt_of_another_form_is_a_tenant_of_its_own(salt: str) -> None:
    assert prefix.tenant_of(salt) == salt
