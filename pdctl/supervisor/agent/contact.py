"""The registry of a cluster as its topology names it, and what the last contact with it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pdctl.control_api import RegistryStatus
from pdctl.errors import PdctlError
from pdctl.net.identity import identity_in
from pdctl.registry import Registry
from pdctl.topology.spec import Cluster

# Shorter secrets can be guessed.
_LEAST_SECRET = 16


@dataclass(slots=True)
class Contact:
    """What the parts of an agent were told of the registry. `reasons`: by part, why it does not hear the registry;
    `since`: when that began, ISO 8601, "" while all hear it."""

    reasons: dict[str, str] = field(default_factory=dict)
    since: str = ""

    def told(self, part: str, reason: str | None) -> bool:
        """A part hears the registry (None), or not. Returns whether that is news."""
        before = bool(self.reasons)
        if reason is None:
            self.reasons.pop(part, None)
        else:
            self.reasons[part] = reason
        if bool(self.reasons) == before:
            return False
        self.since = datetime.now(UTC).isoformat(timespec="seconds") if self.reasons else ""
        return True

    @property
    def status(self) -> RegistryStatus:
        """As `pdctl status` shows it."""
        return RegistryStatus(ok=not self.reasons, since=self.since, reason=next(iter(self.reasons.values()), ""))


def registry_of(cluster: Cluster) -> Registry:
    """A client of the cluster's etcd. Raises PdctlError."""
    # Imported here: a service on one machine needs no etcd.
    from pdctl.registry.etcd.gateway import Credentials, Gateway
    from pdctl.registry.etcd.registry import EtcdRegistry

    credentials, tls = None, None
    if cluster.certificates and any(url.startswith("https:") for url in cluster.etcd):
        tls = identity_in(cluster.certificates).lasting_context
    if cluster.etcd_user:
        credentials = Credentials(cluster.etcd_user, read_secret(cluster.etcd_password_file, "etcd_password_file", 1))
    return EtcdRegistry(Gateway(list(cluster.etcd), tls, credentials))


def read_secret(path: str, key: str, least: int = _LEAST_SECRET) -> str:
    """The secret in a file that a key of [cluster] names. Raises PdctlError."""
    try:
        file = Path(path)
        secret, mode = file.read_text().strip(), file.stat().st_mode
    except (OSError, UnicodeDecodeError) as failure:
        hint = "create it with: pdctl cluster init, and copy it to every node"
        raise PdctlError(f"cluster.{key}: {path} cannot be read: {failure}", hint) from failure
    if mode & 0o077:
        raise PdctlError(f"cluster.{key}: others may read {path}", f"protect it with: chmod 600 {path}")
    if len(secret) < least:
        raise PdctlError(f"cluster.{key}: {path} has fewer than {least} characters")
    return secret
