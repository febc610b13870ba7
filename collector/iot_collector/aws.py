"""AWS for the settings that use it: botocore's session, which finds credentials and renews them.

botocore comes with the extra ``iot-collector[aws]``. It takes credentials from where every AWS
program does (environment, profile, IRSA, EKS Pod Identity, instance role) and renews those that
expire (https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html).
"""

import functools
from typing import Any

from .settings import SettingsError


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
    return botocore.session.get_session()


@functools.cache
def client(service: str, region: str) -> Any:
    """Return a client of an AWS service, ``AWS_ENDPOINT_URL`` honoured.

    :raises SettingsError: botocore is not installed.
    """
    return session().create_client(service, region_name=region)
