"""Certificates for tests of TLS, in the layout that QEMU reads."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_START = datetime.datetime(2020, 1, 1)
_END = datetime.datetime(2099, 1, 1)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "blocklayer"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def make_certificates(parent: Path) -> Path:
    """A folder with an authority, a server 'localhost' and a client 'tester'."""
    folder = parent / "pki"
    folder.mkdir()
    authority = ec.generate_private_key(ec.SECP256R1())
    for kind, common in (("ca", "authority"), ("server", "localhost"), ("client", "tester")):
        key = authority if kind == "ca" else ec.generate_private_key(ec.SECP256R1())
        is_ca = kind == "ca"
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common))
            .issuer_name(_name("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_START)
            .not_valid_after(_END)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca,
                    content_commitment=False, key_encipherment=not is_ca, data_encipherment=False,
                    key_agreement=False, encipher_only=False, decipher_only=False,
                ),
                critical=True,
            )
        )  # fmt: skip
        if kind == "server":
            names = x509.SubjectAlternativeName([x509.DNSName(common)])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(authority, hashes.SHA256())
        (folder / f"{kind}-cert.pem").write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
        )
        if not is_ca:
            (folder / f"{kind}-key.pem").write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
    return folder
