"""TLS credentials as user objects: QEMU's ``tls-creds-x509``, a folder of certificates.

    ca-cert.pem   server-cert.pem  server-key.pem   client-cert.pem  client-key.pem

1. The peer is verified against ``ca-cert.pem``; a server asks clients for a certificate unless
   ``verify-peer`` is off.
2. TLS 1.2 is the oldest version spoken.
3. Files are read when a context is made: new certificates hold from the next connection on.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Literal

import msgspec

from blocklayer.errors import UsageError
from blocklayer.graph.objects import Objects, UserObject


class TlsProperties(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """``dir`` holds the certificates; ``endpoint`` says for which side they are."""

    dir: str
    endpoint: Literal["client", "server"] = "client"
    verify_peer: bool = True


class TlsCredentials(UserObject):
    """A ``tls-creds-x509`` object."""

    Properties = TlsProperties

    def __init__(self, identifier: str, properties: TlsProperties) -> None:
        self.identifier = identifier
        self.properties = properties

    @classmethod
    def make(cls, objects: Objects, identifier: str, properties: Any) -> TlsCredentials:
        """Check that the certificates are there and fit together."""
        made = cls(identifier, properties)
        if properties.endpoint == "server":
            made.server_context()
        else:
            made.client_context()
        return made

    def server_context(self) -> ssl.SSLContext:
        """What a server needs. Raises UsageError."""
        self._check("server")
        return server_context(self.properties.dir, verify_peer=self.properties.verify_peer)

    def client_context(self) -> ssl.SSLContext:
        """What a client needs. Raises UsageError."""
        self._check("client")
        return client_context(self.properties.dir, verify_peer=self.properties.verify_peer)

    def _check(self, endpoint: str) -> None:
        if self.properties.endpoint != endpoint:
            raise UsageError(f"Expecting TLS credentials with a {endpoint} endpoint")


_SHORT_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "EMAIL",
}


def server_context(folder: str, *, verify_peer: bool = True) -> ssl.SSLContext:
    """What a server needs. Raises UsageError."""
    context = _context(folder, ssl.PROTOCOL_TLS_SERVER, "server")
    context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE
    return context


def client_context(folder: str, *, verify_peer: bool = True) -> ssl.SSLContext:
    """What a client needs; without a certificate of its own it comes unnamed. UsageError."""
    context = _context(folder, ssl.PROTOCOL_TLS_CLIENT, "client")
    if not verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _context(folder: str, protocol: int, side: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    authority = Path(folder) / "ca-cert.pem"
    certificate, key = Path(folder) / f"{side}-cert.pem", Path(folder) / f"{side}-key.pem"
    optional = side == "client" and not certificate.exists() and not key.exists()
    for path in (authority,) if optional else (authority, certificate, key):
        if not path.is_file():
            raise UsageError(f"TLS credentials: unable to access {path}: no such file")
    try:
        context.load_verify_locations(authority)
        if not optional:
            context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"TLS credentials in '{folder}' cannot be used: {error}") from error
    return context


def distinguished_name(certificate: dict[str, object]) -> str:
    """The subject, its parts in the order they are stored: ``C=GB,O=Example,CN=client``."""
    subject = certificate.get("subject", ())
    assert isinstance(subject, tuple)
    parts = [f"{_SHORT_NAMES.get(key, key)}={value}" for part in subject for key, value in part]
    return ",".join(parts)
