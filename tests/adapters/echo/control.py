"""The supervisor's only call to an echo engine: whether it makes progress."""

import msgspec

from pdctl.adapters import NoControl, Progress


class EchoControl(NoControl):
    """See Control."""

    progress_path = "/progress"

    def progress(self, body: bytes) -> Progress:
        """See Control.progress."""
        return msgspec.json.decode(body, type=Progress)


CONTROL = EchoControl()
