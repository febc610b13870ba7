"""The botocore session, AWS clients and AWS errors, for the settings that use AWS.

botocore comes with the extra ``iot-collector[aws]``. It finds credentials as every AWS SDK does
(environment, profile, IRSA, EKS Pod Identity, instance role) and renews those that expire
(https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html).
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from .log import one_line
from .settings import SettingsError

# Error codes of AWS services. Some services have several codes for one error.
_DENIED = {"AccessDenied", "AccessDeniedException"}
_EXPIRED = {
    *("ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidClientTokenId"),
    *("InvalidIdentityToken", "SignatureDoesNotMatch", "UnrecognizedClientException"),
}
_MISSING = {
    *("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "ResourceNotFoundException"),
}


class AwsError(Exception):
    """A call to AWS failed. The text says what to do."""


@functools.cache
def session() -> Any:
    """Return the botocore session of this process.

    :raises SettingsError: botocore is not installed.
    """
    try:
        import botocore.session
    except ImportError:
        raise SettingsError(
            "a setting needs AWS, but botocore is not installed; pip install 'iot-collector[aws]'"
        ) from None
    # At level debug they log signatures and complete responses, which may contain a password.
    for name in ("botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return botocore.session.get_session()


@functools.cache
def client(service: str, region: str | None = None) -> Any:
    """Return a client for an AWS service.

    ``AWS_ENDPOINT_URL`` is respected. Each call ends within a minute, even if the network hangs.

    :param region: None for the region in AWS_REGION or in the profile.

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
    """Turn a botocore error in the block into an `AwsError`.

    :param action: the IAM action that the block needs, for example ``sqs:ReceiveMessage``.
    :param resource: the ARN or the name of the resource that the action is for.
    """
    session()
    from botocore.exceptions import BotoCoreError, ClientError, NoRegionError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if error.operation_name.startswith("AssumeRole"):
            hint = "check AWS_ROLE_ARN and the trust policy of that role"
        elif code in _DENIED:
            hint = f"the credentials need permission for {action} on {resource}"
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
        hint = "check the AWS credentials, and the network route to AWS or to its VPC endpoint"
        raise AwsError(f"{one_line(error)}; {hint}") from error
