"""Files that users provide: read with or without a byte order mark, and checked before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

from pdctl.errors import PdctlError

_KEY_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+sha256:(?P<hash>[0-9a-f]{64})")


def read_user_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark. Raises OSError, UnicodeDecodeError."""
    return path.read_text(encoding="utf-8-sig")


def read_api_keys(path: Path) -> dict[bytes, str]:
    """SHA-256 of a key to its name. Raises PdctlError with the malformed line."""
    try:
        text = read_user_text(path)
    except (OSError, UnicodeDecodeError) as failure:
        raise PdctlError(f"API keys {path} cannot be read: {failure}", "create it with: pdctl key NAME") from failure
    found: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _KEY_LINE.fullmatch(words)
        if match is None:
            raise PdctlError(f"{path}:{number}: not NAME sha256:HASH", "create a line with: pdctl key NAME")
        found[bytes.fromhex(match["hash"])] = match["name"]
    return found


def tls_problem(cert: str, key: str) -> tuple[str, str]:
    """Which of `tls_cert` and `tls_key` is unusable, and why; ("", "") if both are fine."""
    import ssl  # only topologies with TLS pay for it

    try:
        ssl.create_default_context(cafile=cert)
    except (ssl.SSLError, OSError, ValueError) as failure:
        return "tls_cert", f"{cert} is not a PEM certificate ({_first_words(failure)})"
    try:
        # An encrypted key would prompt for its password on a terminal, which a service does not have.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as failure:
        if "KEY_VALUES_MISMATCH" in str(failure):
            return "tls_key", f"{key} is not the key of {cert}"
        return "tls_key", f"{key} is not a PEM key without a password ({_first_words(failure)})"
    return "", ""


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _first_words(failure: Exception) -> str:
    return str(failure).partition(" (_ssl")[0]
