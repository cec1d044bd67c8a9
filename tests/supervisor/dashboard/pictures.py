"""Pictures of the page for the docs, with the stage's service: light, dark, and on a phone.

python -m tests.supervisor.dashboard.pictures FOLDER
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from PIL import Image

from tests.chromium import Browser, browser
from tests.supervisor.dashboard.served import Served, served

# Name, width and height of the window, dark, what is scrolled to the top.
_PICTURES = (
    ("dash-light", 1440, 1180, False, "main"),
    ("dash-dark", 1440, 1180, True, "#charts"),
    ("dash-phone", 390, 844, True, "main"),
)
_MOST_BYTES = 200_000
_COLOURS = 128


def main(folder: Path) -> None:
    with browser() as page, served() as stage:
        for name, width, height, dark, top in _PICTURES:
            show(page, stage, (width, height), dark, top)
            path = folder / f"{name}.png"
            path.write_bytes(small(page.picture(whole=False)))
            assert path.stat().st_size < _MOST_BYTES, f"{path} has {path.stat().st_size} bytes"


def show(page: Browser, stage: Served, size: tuple[int, int], dark: bool, top: str) -> None:
    page.open("about:blank", *size)
    page.open(stage.link(), *size, dark=dark)
    page.until("document.querySelectorAll('.card').length && document.querySelectorAll('#request-table tr').length > 1")
    page.evaluate("document.querySelector('tr[data-tone=busy] button').click()")
    page.evaluate("document.querySelector('#doctor').scrollIntoView()")
    page.until("document.querySelectorAll('#finding-list li').length", 120)
    head = "document.querySelector('.top').offsetHeight"
    page.evaluate(f"scrollTo(0, document.querySelector({top!r}).getBoundingClientRect().top + scrollY - {head} - 12)")
    # The mouse has left a tooltip, and the last transition ends.
    time.sleep(1.5)


def small(picture: bytes) -> bytes:
    """The same picture with fewer colours."""
    found = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(
        found, "PNG", optimize=True
    )
    return found.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
