"""The certificates of a fleet: a CA of its own, and the broker's, which clients and hosts ask for."""

import datetime
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder, GeneralName, KeyUsage, Name

LIVES = datetime.timedelta(days=3650)  # a fleet whose certificate has ended stands still
SKEW = datetime.timedelta(hours=1)  # of the clocks of those that look at it


def make_ca(folder: Path) -> None:
    """Write `ca.crt` and `ca.key`."""
    from cryptography import x509

    key = _new_key()
    name = _name("sandbatch CA")
    builder = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    builder = builder.add_extension(_usage(is_ca=True), True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    _write(folder / "ca", key, _signed(builder, key))


def make_broker(folder: Path, ca: Path, host: str) -> None:
    """Write `broker.crt` and `broker.key` for the name or address `host`; `ca` has those of the CA."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority = x509.load_pem_x509_certificate((ca / "ca.crt").read_bytes())
    authority_key = load_pem_private_key((ca / "ca.key").read_bytes(), password=None)
    if not isinstance(authority_key, EllipticCurvePrivateKey):
        raise ValueError(f"{ca / 'ca.key'} is none of ours")
    key = _new_key()
    # A common name has 64 characters at most; whoever looks reads the alternative names.
    builder = _builder(_name("sandbatch broker"), authority.subject, key)
    for extension, is_critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(is_ca=False), True),
        (x509.SubjectAlternativeName(_names(host)), False),
        # Python 3.13 refuses a chain without these two.
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ):
        builder = builder.add_extension(extension, is_critical)
    _write(folder / "broker", key, _signed(builder, authority_key))


def _new_key() -> "EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())  # a browser's common ground; any OpenSSL has it


def _name(text: str) -> "Name":
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _names(host: str) -> "list[GeneralName]":
    from cryptography import x509

    try:
        return [x509.IPAddress(ipaddress.ip_address(host))]
    except ValueError:
        return [x509.DNSName(host)]


def _builder(subject: "Name", issuer: "Name", key: "EllipticCurvePrivateKey") -> "CertificateBuilder":
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + LIVES)
    )


def _usage(*, is_ca: bool) -> "KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(builder: "CertificateBuilder", key: "EllipticCurvePrivateKey") -> "Certificate":
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA256())


def _write(path: Path, key: "EllipticCurvePrivateKey", certificate: "Certificate") -> None:
    from cryptography.hazmat.primitives import serialization as forms

    pem = forms.Encoding.PEM
    private = key.private_bytes(pem, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    for suffix, text, mode in ((".key", private, 0o600), (".crt", certificate.public_bytes(pem), 0o644)):
        handle = os.open(path.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(text)
