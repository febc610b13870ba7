"""AWS for the settings that use it: botocore's session, which finds credentials and renews them.

botocore comes with the extra ``iot-collector[aws]``. It takes credentials from where every AWS
program does (environment, profile, IRSA, EKS Pod Identity, instance role) and renews those that
expire (https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html).
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from .log import one_line
from .settings import SettingsError

# Error codes of AWS's services; some services give the same error under several names.
_DENIED = {"AccessDenied", "AccessDeniedException"}
_EXPIRED = {
    *("ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidClientTokenId"),
    *("InvalidIdentityToken", "SignatureDoesNotMatch", "UnrecognizedClientException"),
}
_MISSING = {
    *("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "ResourceNotFoundException"),
}


class AwsError(Exception):
    """AWS did not do what was asked. The text says what to do."""


@functools.cache
def session() -> Any:
    """Return the process's botocore session.

    :raises SettingsError: botocore is not installed.
    """
    try:
        import botocore.session
    except ImportError:
        raise SettingsError(
            "a setting names AWS, and botocore is not installed; pip install 'iot-collector[aws]'"
        ) from None
    # At the level debug they log signatures and whole answers, which may hold a password.
    for name in ("botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return botocore.session.get_session()


@functools.cache
def client(service: str, region: str | None = None) -> Any:
    """Return a client of an AWS service, ``AWS_ENDPOINT_URL`` honoured.

    Its calls end within a minute, whatever the network does. Where no region is given,
    AWS_REGION or the profile names it.

    :raises SettingsError: botocore is not installed.
    """
    made = session()
    from botocore.config import Config

    return made.create_client(
        service,
        region_name=region or os.environ.get("AWS_REGION"),
        config=Config(
            connect_timeout=5,
            read_timeout=10,
            max_pool_connections=50,
            retries={"mode": "standard", "total_max_attempts": 3},
        ),
    )


@contextlib.contextmanager
def explained(action: str, resource: str) -> Iterator[None]:
    """Make an `AwsError` of botocore's errors in the block.

    :param action: the IAM action that the block needs, for example ``sqs:ReceiveMessage``.
    :param resource: what it needs it on: an ARN, or a name.
    """
    session()
    from botocore.exceptions import BotoCoreError, ClientError, NoRegionError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if error.operation_name.startswith("AssumeRole"):
            hint = "check AWS_ROLE_ARN, and whom the trust policy of that role names"
        elif code in _DENIED:
            hint = f"the credentials must be allowed {action} on {resource}"
        elif code in _EXPIRED:
            hint = "the AWS credentials are expired or wrong: renew them"
        elif code in _MISSING:
            hint = f"check the name, account and region of {resource}"
        else:
            hint = f"{action} on {resource} failed"
        raise AwsError(f"{one_line(error)}; {hint}") from error
    except NoRegionError as error:
        raise AwsError(f"no region for {resource}: give its ARN, or set AWS_REGION") from error
    except BotoCoreError as error:  # credentials not found, or endpoint not reached
        hint = "check the AWS credentials, and the network's way to AWS or its VPC endpoint"
        raise AwsError(f"{one_line(error)}; {hint}") from error
