"""Certificate and key for HTTPS, checked before anything starts.

llmlab serve --tls-cert fullchain.pem --tls-key privkey.pem
"""

from __future__ import annotations

import ssl
from pathlib import Path

from pipelines.errors import ConfigError

OPTIONS = "--tls-cert FILE --tls-key FILE"


class _Locked(Exception):
    """The key is encrypted, and the library asks for its password."""


def context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return what a server needs to speak TLS 1.2 and 1.3.

    Args:
        certificate: PEM file with the certificate and those between it and its authority.
        key: PEM file with its private key, not encrypted.

    Raises:
        ConfigError: a file is missing, is not PEM, is encrypted, or the two do not belong together.
    """
    for file, what in ((certificate, "certificate"), (key, "private key")):
        try:
            text = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"the {what} {file} cannot be read ({error.strerror})", "a PEM file", OPTIONS) from None
        if b"-----BEGIN" not in text:
            raise ConfigError(f"the {what} {file} is not a PEM file", "-----BEGIN ...", "openssl converts other forms")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        made.load_cert_chain(certificate, key, password=_ask)
    except _Locked:
        raise ConfigError(f"the private key {key} is encrypted", "a key without a password, in a file of mode 0600",
                          f"openssl pkey -in {key} -out open.pem") from None  # fmt: skip
    except ssl.SSLError as error:
        reason = error.reason or "not understood"
        came = {"KEY_VALUES_MISMATCH": "do not belong together"}.get(reason, f"cannot be used ({reason})")
        raise ConfigError(f"{certificate} and {key} {came}", "a certificate and its own private key", OPTIONS) from None
    return made


def _ask() -> str:
    raise _Locked
