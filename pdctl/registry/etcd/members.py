"""Which member of the etcd cluster is asked: one, until it fails, then the next. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Members:
    """The addresses of all members. `first` spreads the agents of a cluster over them."""

    def __init__(self, urls: Sequence[str], first: int) -> None:
        assert urls, "etcd has a member"
        self._urls = tuple(urls)
        self._at = first % len(urls)

    @property
    def current(self) -> str:
        """The address that is asked now."""
        return self._urls[self._at]

    def failed(self, url: str) -> None:
        """A call to `url` failed: from now on the next one is asked, unless another call has found that out already."""
        if url == self.current:
            self._at = (self._at + 1) % len(self._urls)

    def __len__(self) -> int:
        return len(self._urls)
