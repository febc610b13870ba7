"""The signed WebSocket to AWS IoT Core.

The URL is signed with Signature Version 4 for the service ``iotdevicegateway``. Each connection has
a new signature, with the current credentials. The session token of temporary credentials is not
signed: it is appended afterwards
(https://docs.aws.amazon.com/iot/latest/developerguide/protocols.html). The signature covers the
header ``Host``, which therefore has to be the endpoint's name without a port; paho would add one.
"""

import ssl
from urllib.parse import quote, urlsplit

from paho.mqtt.client import Client

from .aws import session
from .iot_core import PATH
from .settings import Settings

_SERVICE = "iotdevicegateway"
_EXPIRES = 300  # seconds; our clock may be behind that of AWS by at most this
# Seconds and attempts that a request for credentials may take. The defaults of botocore, a minute
# and five attempts, would make /livez fail.
_TIMEOUT, _ATTEMPTS = 5, 2

CREDENTIALS_HINT = (
    "the collector looks in AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_WEB_IDENTITY_TOKEN_FILE with "
    "AWS_ROLE_ARN (IRSA), EKS Pod Identity and the instance's role"
)
_REFUSED_HINT = (
    "AWS IoT Core refuses the signature: check the clock of this machine, whether the credentials "
    "are still valid, and the region (AWS_REGION, for a custom domain)"
)


class CredentialsError(OSError):
    """There are no AWS credentials at the moment. This may be temporary, as for a broker."""


class Handshake:
    """The response to the WebSocket handshake. paho only says that the handshake failed."""

    def __init__(self) -> None:
        self.answer = bytearray()  # its first line

    def context(self, ca_file: str | None) -> ssl.SSLContext:
        """Return a TLS context for one connection, which keeps the first line that is received."""
        answer = self.answer

        class Socket(ssl.SSLSocket):
            def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
                data = super().recv(buflen, flags)
                if not answer.endswith(b"\n"):
                    answer.extend(data)
                return data

        context = ssl.create_default_context(cafile=ca_file)
        context.sslsocket_class = Socket
        return context

    def explain(self, error: OSError) -> OSError:
        """Return the error to raise instead of this error of the handshake."""
        status = self.answer.decode("latin-1").strip()
        if not status:
            return error
        text = f"{error}: {status[:80]}"
        if " 403" in status:
            # Credentials without an expiry, as in a file, are cached. There may be new ones.
            session.cache_clear()
            text = f"{text}; {_REFUSED_HINT}"
        return ConnectionRefusedError(text)


def set_up(client: Client, settings: Settings) -> Handshake:
    """Give a client a freshly signed path, the header Host, and TLS.

    :raises CredentialsError: there are no credentials, or they cannot be renewed.
    :raises OSError: the CA file cannot be read.
    """
    handshake = Handshake()
    host = settings.broker.host
    client.ws_set_options(path=signed_path(host, settings.aws_region), headers={"Host": host})
    ca_file = str(settings.mqtt_ca_file) if settings.mqtt_ca_file else None
    client.tls_set_context(handshake.context(ca_file))
    return handshake


def signed_path(host: str, region: str) -> str:
    """Return path and query of the URL to connect to.

    :raises CredentialsError: there are no credentials, or they cannot be renewed.
    """
    from botocore.auth import SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import ReadOnlyCredentials

    key, secret, token = _credentials(region)
    request = AWSRequest(method="GET", url=f"https://{host}{PATH}")
    SigV4QueryAuth(ReadOnlyCredentials(key, secret, None), _SERVICE, region, _EXPIRES).add_auth(
        request
    )
    path = f"{PATH}?{urlsplit(request.url).query}"
    return f"{path}&X-Amz-Security-Token={quote(token, safe='')}" if token else path


def _credentials(region: str) -> tuple[str, str, str | None]:
    """Return access key, secret key and session token, renewed if necessary."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    aws = session()
    if aws.get_default_client_config() is None:
        retries = {"total_max_attempts": _ATTEMPTS}
        config = Config(connect_timeout=_TIMEOUT, read_timeout=_TIMEOUT, retries=retries)
        aws.set_default_client_config(config)
    if aws.get_config_variable("region") is None:  # for calls to STS
        aws.set_config_variable("region", region)
    try:
        credentials = aws.get_credentials()
        frozen = credentials and credentials.get_frozen_credentials()
    # ValueError, TypeError, KeyError: a credentials file or the output of a program is malformed.
    except (BotoCoreError, ClientError, OSError, ValueError, TypeError, KeyError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise CredentialsError(f"no AWS credentials ({fault}); {CREDENTIALS_HINT}") from None
    if frozen is None:
        raise CredentialsError(f"no AWS credentials found; {CREDENTIALS_HINT}")
    return frozen.access_key, frozen.secret_key, frozen.token
