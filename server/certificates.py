"""The coordinator's own certificate authority and the certificate that sites see.

Sites get the authority's certificate on a trusted way, once, and then know the coordinator by
it; no public authority is asked.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import write_atomic

_AUTHORITY_DAYS = 3650
_SERVER_DAYS = 825
_SKEW = timedelta(minutes=10)  # clocks of sites may be behind


def make_authority(certificate: Path, key: Path) -> None:
    """Make a certificate authority; where both files are there already, nothing happens.

    Raises:
        SettingsError: One of the files is there without the other.
    """
    if _whole(certificate, key):
        return
    private = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dafne-federated coordinator")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    signed = (
        _builder(name, name, private, _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(private, hashes.SHA384())
    )
    _write(certificate, key, signed, private)


def make_server_certificate(
    certificate: Path, key: Path, hosts: Sequence[str], authority: Path, authority_key: Path
) -> None:
    """Make the certificate of the coordinator; one that is there already is kept.

    This machine's own names are in it, too, because programs here check it as sites do.

    Args:
        certificate: Where it goes.
        key: Where its key goes.
        hosts: Names and addresses under which sites reach the coordinator.
        authority: Who signs.
        authority_key: The signer's key.

    Raises:
        SettingsError: The certificate that is there is for other names.
    """
    names = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"]))
    if _whole(certificate, key):
        known = host_names(certificate)
        if missing := [name for name in hosts if name not in known]:
            msg = (
                f"{certificate}: made for {', '.join(known)}, not for {', '.join(missing)}; remove "
                "it and its key, and run this again"
            )
            raise SettingsError(msg)
        return
    private = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    signer = x509.load_pem_x509_certificate(authority.read_bytes())
    signer_key = serialization.load_pem_private_key(authority_key.read_bytes(), None)
    assert isinstance(signer_key, ec.EllipticCurvePrivateKey)  # we made it
    signed = (
        _builder(subject, signer.subject, private, _SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_name(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
            critical=False,
        )
        .sign(signer_key, hashes.SHA384())
    )
    _write(certificate, key, signed, private)


def host_names(certificate: Path) -> list[str]:
    """Return the names and addresses that a certificate is for."""
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def days_left(certificate: Path) -> int:
    """Return how many days a certificate is still valid."""
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    return (loaded.not_valid_after_utc - datetime.now(UTC)).days


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _whole(certificate: Path, key: Path) -> bool:
    """Return whether both are there; a key is never replaced because its other half is gone."""
    if certificate.exists() != key.exists():
        there, gone = (certificate, key) if certificate.exists() else (key, certificate)
        msg = f"{there} is there without {gone}; put that back, or remove the first to make both"
        raise SettingsError(msg)
    return certificate.exists()


def _write(
    certificate: Path, key: Path, signed: x509.Certificate, private: ec.EllipticCurvePrivateKey
) -> None:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    write_atomic(
        key, private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain), private=True
    )
    write_atomic(certificate, signed.public_bytes(pem))
