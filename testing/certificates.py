"""A certificate authority (CA) and certificates that it signed."""

from pathlib import Path
from typing import NamedTuple

import trustme

from .service import HOST


class Certificates(NamedTuple):
    """Paths of a CA certificate, and of certificates and keys that the CA signed."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


def make_certificates(folder: Path, *names: str) -> Certificates:
    """Create a CA, a server certificate for 127.0.0.1 and names, and a client certificate."""
    authority = trustme.CA()
    files = Certificates(
        *(folder / f for f in ("ca.crt", "server.crt", "server.key", "client.crt", "client.key"))
    )
    authority.cert_pem.write_to_path(files.ca)
    server, client = authority.issue_cert(HOST, *names), authority.issue_cert(common_name="client")
    for made, certificate, key in (
        (server, files.server, files.server_key),
        (client, files.client, files.client_key),
    ):
        made.cert_chain_pems[0].write_to_path(certificate)
        made.private_key_pem.write_to_path(key)
    return files
