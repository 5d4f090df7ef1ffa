"""Keys and certificates for a federation on this machine: what an operator makes once, made for a trial."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


CA, CERTIFICATE, KEY = "ca.crt", "server.crt", "server.key"
_VALID = datetime.timedelta(days=30)


def make_node_key(folder: Path, name: str) -> tuple[Path, str]:
    """A new key of a node: the file with the private one, and the public one as OpenSSH text."""
    key = ec.generate_private_key(ec.SECP384R1())
    path = folder / f"{name}.key"
    _write_secret(path, _private(key, serialization.PrivateFormat.OpenSSH))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public + b"\n")
    return path, public.decode()


def make_certificates(folder: Path) -> None:
    """A certificate for a server on 127.0.0.1, signed by an authority whose key is thrown away."""
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hf-sigma loopback authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    own = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    signs = _builder(issuer, issuer, authority).add_extension(x509.BasicConstraints(True, 0), critical=True)
    signs = signs.add_extension(_usage(sign_certificates=True), critical=True).add_extension(own, critical=False)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    serves = _builder(subject, issuer, server).add_extension(x509.SubjectAlternativeName(names), critical=False)
    serves = serves.add_extension(x509.BasicConstraints(False, None), critical=True)
    serves = serves.add_extension(_usage(sign_certificates=False), critical=True)
    serves = serves.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
    serves = serves.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    for name, builder in ((CA, signs), (CERTIFICATE, serves)):
        certificate = builder.sign(authority, hashes.SHA384())
        (folder / name).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_secret(folder / KEY, _private(server, serialization.PrivateFormat.PKCS8))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(hours=1),
        not_valid_after=now + _VALID,
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
