"""The lookup ``iot.platform.iot_endpoint``: the endpoint of AWS IoT Core."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

try:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError:  # pragma: no cover - the role's preflight reports it first
    boto3 = None

DOCUMENTATION = """
name: iot_endpoint
short_description: The endpoint of AWS IoT Core in a region
description:
  - Asks IoT Core for the account's endpoint in the region (DescribeEndpoint).
  - No module of the collection amazon.aws returns it.
  - Credentials come from the environment of ansible-playbook, as boto3 reads them.
options:
  _terms:
    description: The type of the endpoint, C(iot:Data-ATS) if none is given.
    default: [iot:Data-ATS]
  region:
    description: The region.
    type: str
    required: true
"""
EXAMPLES = """
- ansible.builtin.debug:
    msg: "{{ lookup('iot.platform.iot_endpoint', region='eu-west-1') }}"
"""
RETURN = """
_raw:
  description: The host name of each endpoint, without scheme and port.
  type: list
  elements: str
"""


class LookupModule(LookupBase):  # type: ignore[misc]  # Ansible has no types
    """The lookup itself; see DOCUMENTATION."""

    def run(
        self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[str]:
        self.set_options(var_options=variables, direct=kwargs)
        if boto3 is None:
            raise AnsibleLookupError(
                "boto3 is not installed where ansible-playbook runs: pip install boto3"
            )
        region = self.get_option("region")
        client = boto3.client("iot", region_name=region)
        try:
            return [
                client.describe_endpoint(endpointType=term)["endpointAddress"]
                for term in terms or ["iot:Data-ATS"]
            ]
        except (BotoCoreError, ClientError) as error:
            raise AnsibleLookupError(f"The endpoint of IoT Core in {region}: {error}") from error
