"""The certificate authority of a cluster: the only file that needs the package `cryptography`, which only the verbs of
`pdctl cluster` load.

Certificates have no common name: etcd refuses those that have one in calls of its gateway, if it has users.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pdctl.errors import PdctlError
from pdctl.net.identity import uri_of
from pdctl.net.identity.files import write_file

CA, CA_KEY = "ca.pem", "ca.key"
# Clocks of machines differ.
_BACKDATED = timedelta(hours=1)
_CA_LIFE = timedelta(days=3650)
_CLIENT, _SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


class Key(NamedTuple):
    """A new key: the file's content, and a request for a certificate of it."""

    pem: bytes
    request: bytes


class Authority:
    """The CA in a folder."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: Path, service: str) -> Authority:
        """Make a CA in a folder. Raises PdctlError if it has one."""
        if (folder / CA).exists() or (folder / CA_KEY).exists():
            raise PdctlError(
                f"{folder} has a CA already", "name another folder; see docs/cluster.md for a change of CA"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(service, "certificate authority")
        usage = _usage(signs_certificates=True)
        subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        built = (
            _begun(name, name, key.public_key(), _CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(subject, critical=False)
            .sign(key, hashes.SHA256())
        )
        write_file(folder / CA_KEY, _key_pem(key), 0o600)
        write_file(folder / CA, built.public_bytes(serialization.Encoding.PEM), 0o644)
        return cls(built, key)

    @classmethod
    def read(cls, folder: Path) -> Authority:
        """The CA in a folder. Raises PdctlError."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / CA).read_bytes())
            key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        except (OSError, ValueError, TypeError) as failure:
            message = f"the CA in {folder} cannot be read: {failure}"
            raise PdctlError(message, "make one with: pdctl cluster init DIR --service NAME") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise PdctlError(f"{folder / CA_KEY} is not the key of {folder / CA}", "restore both from one backup")
        return cls(certificate, key)

    @property
    def service(self) -> str:
        """The service whose nodes it certifies."""
        return str(self._certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its certificate."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def certify(self, request: bytes, node: str, addresses: tuple[str, ...], days: float) -> bytes:
        """The certificate of a node. What the request says beside its key does not count. Raises PdctlError."""
        names = [x509.UniformResourceIdentifier(uri_of(self.service, node)), *_ips(addresses)]
        return self._issue(_asked(request), names, [_SERVER, _CLIENT], days)

    def certify_server(self, request: bytes, address: str, days: float) -> bytes:
        """The certificate of a server that is no node: it says where nodes join. Raises PdctlError."""
        return self._issue(_asked(request), _ips((address,)), [_SERVER], days)

    def _issue(
        self,
        key: CertificatePublicKeyTypes,
        names: list[x509.GeneralName],
        purposes: list[x509.ObjectIdentifier],
        days: float,
    ) -> bytes:
        subject = _name(self.service, "node")
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        built = (
            _begun(subject, self._certificate.subject, key, timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return built.public_bytes(serialization.Encoding.PEM)


def new_key() -> Key:
    """A new key for a node."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return Key(_key_pem(key), request.public_bytes(serialization.Encoding.PEM))


class Validity(NamedTuple):
    """When a certificate begins and ends, and its IP addresses."""

    begins: datetime
    ends: datetime
    addresses: tuple[str, ...]

    def is_due(self, now: datetime) -> bool:
        """Whether half of its life is over."""
        return now >= self.begins + (self.ends - self.begins) / 2


def validity_of(pem: bytes) -> Validity:
    """What a certificate says of these. Raises PdctlError."""
    try:
        found = x509.load_pem_x509_certificate(pem)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as failure:
        raise PdctlError(f"the certificate cannot be read: {failure}") from None
    addresses = tuple(str(address) for address in names.get_values_for_type(x509.IPAddress))
    return Validity(found.not_valid_before_utc, found.not_valid_after_utc, addresses)


def now() -> datetime:
    """The time that certificates are compared with."""
    return datetime.now(UTC)


def _asked(request: bytes) -> CertificatePublicKeyTypes:
    try:
        found = x509.load_pem_x509_csr(request)
    except ValueError as failure:
        raise PdctlError(f"the request for a certificate cannot be read: {failure}") from None
    if not found.is_signature_valid or not isinstance(key := found.public_key(), ec.EllipticCurvePublicKey):
        raise PdctlError("the request for a certificate is not signed with an EC key of its own")
    return key


def checked_addresses(addresses: Iterable[str]) -> tuple[str, ...]:
    """IP addresses of one machine. Raises PdctlError for others."""
    found = tuple(addresses)
    for address in found:
        try:
            is_one = not ipaddress.ip_address(address).is_unspecified
        except ValueError:
            is_one = False
        if not is_one:
            raise PdctlError(f"{address} is not the address of a machine", "nodes call each other as 10.0.0.2")
    return found


def _ips(addresses: tuple[str, ...]) -> list[x509.GeneralName]:
    return [x509.IPAddress(ipaddress.ip_address(address)) for address in checked_addresses(addresses)]


def _begun(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, life: timedelta
) -> x509.CertificateBuilder:
    began = now() - _BACKDATED
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(began)
        .not_valid_after(now() + life)
    )


def _name(service: str, part: str) -> x509.Name:
    """Names of a CA and of what it signs must differ: a certificate that names itself as its issuer is its own."""
    words = ((NameOID.ORGANIZATION_NAME, service), (NameOID.ORGANIZATIONAL_UNIT_NAME, part))
    return x509.Name([x509.NameAttribute(kind, word) for kind, word in words])


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
