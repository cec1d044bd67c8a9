from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from pdctl.engine.model import ways
from pdctl.engine.model.products import ROW_STEPS
from pdctl.engine.model.ways import Size, Ways, choose

SIZES: list[Size] = [(512, 256), (256, 512)]
OTHER = Ways(packed=False, plain=("pieces", "linear", "pieces", "linear"), measured=True)


def only_file(folder: Path) -> Path:
    (found,) = folder.glob("*.json")
    return found


def forge(folder: Path) -> None:
    """Replace every choice in the table by OTHER, which a measurement hardly finds."""
    path = only_file(folder)
    content = json.loads(path.read_text())
    content["shapes"] = {name: msgspec.to_builtins(OTHER) for name in content["shapes"]}
    path.write_text(json.dumps(content))


def test_what_was_measured_is_kept_and_used(tmp_path: Path) -> None:
    first = choose(SIZES, torch.float32, tmp_path / "new")
    assert set(first) == set(SIZES)
    assert all(way.measured for way in first.values())
    assert choose(SIZES, torch.float32, tmp_path / "new") == first
    forge(tmp_path / "new")
    assert choose(SIZES, torch.float32, tmp_path / "new") == dict.fromkeys(SIZES, OTHER)
    assert not list((tmp_path / "new").glob("*.part"))


def test_only_new_shapes_are_measured(tmp_path: Path) -> None:
    choose(SIZES[:1], torch.float32, tmp_path)
    forge(tmp_path)
    found = choose(SIZES, torch.float32, tmp_path)
    assert found[SIZES[0]] == OTHER
    assert found[SIZES[1]].measured
    assert choose(SIZES, torch.float32, tmp_path) == found


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": [], "shapes": {}}', '{"format": 2}', "\udcff"])
def test_a_broken_table_is_measured_again(damage: str, tmp_path: Path) -> None:
    choose(SIZES, torch.float32, tmp_path)
    path = only_file(tmp_path)
    path.write_bytes(damage.encode(errors="surrogateescape"))
    assert all(way.measured for way in choose(SIZES, torch.float32, tmp_path).values())
    assert set(json.loads(path.read_text())["shapes"]) == {"512x256", "256x512"}


def test_a_table_with_an_unknown_way_is_measured_again(tmp_path: Path) -> None:
    choose(SIZES, torch.float32, tmp_path)
    path = only_file(tmp_path)
    for old, new in (('"linear"', '"guessed"'), ('"transposed"', '"guessed"'), ('"pieces"', '"guessed"')):
        path.write_text(path.read_text().replace(old, new))
    assert all(way.measured for way in choose(SIZES, torch.float32, tmp_path).values())


@pytest.mark.parametrize(
    "other", [("get_num_threads", lambda: 99), ("__version__", "0.0")], ids=["threads", "version of torch"]
)
def test_other_conditions_have_another_table(
    other: tuple[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(SIZES[:1], torch.float32, tmp_path)
    choose(SIZES[:1], torch.bfloat16, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    monkeypatch.setattr(torch, *other)
    choose(SIZES[:1], torch.float32, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_without_a_usable_folder_the_rules_are_fixed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fixed = choose(SIZES, torch.float32, None)
    assert not any(way.measured for way in fixed.values())
    assert choose(SIZES, torch.float32, tmp_path / "file" / "below") == fixed


def test_a_full_disk_leaves_no_half_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    assert not choose([(64, 32)], torch.float32, tmp_path)[64, 32].measured
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_that_is_held_for_too_long_leads_to_the_fixed_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(SIZES[:1], torch.float32, tmp_path)
    lock = only_file(tmp_path).with_suffix(".lock")
    monkeypatch.setattr(ways, "_LOCK_SECONDS", 0.0)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert choose(SIZES, torch.float32, tmp_path) == choose(SIZES, torch.float32, None)
    assert choose(SIZES, torch.float32, tmp_path)[SIZES[1]].measured


def test_a_shape_without_time_gets_the_fixed_rules_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_MOST_SECONDS", 0.0)
    found = choose(SIZES, torch.float32, tmp_path)
    assert not any(way.measured for way in found.values())
    monkeypatch.undo()
    assert choose(SIZES, torch.float32, tmp_path) == found


def test_a_way_that_this_torch_lacks_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "packs", lambda dtype: False)
    found = choose(SIZES, torch.float32, tmp_path)
    assert not any(way.packed for way in found.values())
    assert all(len(way.plain) == len(ROW_STEPS) for way in found.values())


_PROCESS = """
import sys
from pathlib import Path
import msgspec, torch
from pdctl.engine.model.ways import choose
torch.set_num_threads(1)
sys.stdin.read()
found = choose([(512, 256), (256, 512), (640, 640)], torch.float32, Path(sys.argv[1]))
print(msgspec.json.encode({f"{size}": way for size, way in found.items()}).decode())
"""


def test_processes_that_start_together_choose_alike(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(tmp_path)], stdin=-1, stdout=-1, text=True)
        for _ in range(2)
    ]
    first, second = (process.communicate("", timeout=120)[0] for process in started)
    assert '"measured":true' in first
    assert first == second
