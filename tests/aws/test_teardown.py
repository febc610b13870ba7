"""``playbooks/teardown.yml -e target=aws`` deletes the whole system and nothing else."""

from __future__ import annotations

import pytest
from deployments import Deployment

from testing.aws.emulator import Emulator

pytestmark = pytest.mark.timeout(900)


def create_unrelated_resources(account: Emulator, region: str) -> dict[str, str]:
    """Create resources of other systems, with similar names and without our tag."""
    ec2 = account.client("ec2", region)
    vpc = ec2.create_vpc(CidrBlock="10.99.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.99.0.0/24")["Subnet"]["SubnetId"]
    interface = ec2.create_network_interface(SubnetId=subnet)["NetworkInterface"]
    volume = ec2.create_volume(AvailabilityZone=f"{region}a", Size=1)["VolumeId"]
    account.client("logs", region).create_log_group(logGroupName="/aws/eks/iot-system-2/cluster")
    account.client("ecr", region).create_repository(repositoryName="iot-system-2/collector")
    account.client("sqs", region).create_queue(QueueName="iot-system-replay-old")
    account.client("iam", region).create_role(
        RoleName="iot-system-eks-of-somebody-else", AssumeRolePolicyDocument="{}"
    )
    return {"interface": interface["NetworkInterfaceId"], "volume": volume, "vpc": vpc}


def assert_unrelated_resources_exist(
    account: Emulator, region: str, unrelated: dict[str, str]
) -> None:
    ec2 = account.client("ec2", region)
    ec2.describe_vpcs(VpcIds=[unrelated["vpc"]])
    ec2.describe_network_interfaces(NetworkInterfaceIds=[unrelated["interface"]])
    ec2.describe_volumes(VolumeIds=[unrelated["volume"]])
    groups = account.client("logs", region).describe_log_groups()["logGroups"]
    assert "/aws/eks/iot-system-2/cluster" in [group["logGroupName"] for group in groups]
    account.client("ecr", region).describe_repositories(repositoryNames=["iot-system-2/collector"])
    account.client("sqs", region).get_queue_url(QueueName="iot-system-replay-old")
    account.client("iam", region).get_role(RoleName="iot-system-eks-of-somebody-else")


def create_leftovers_of_a_cluster(account: Emulator, region: str) -> None:
    """Create network interfaces of deleted nodes, volumes of claims and a security group of EKS."""
    ec2 = account.client("ec2", region)
    ours = [{"Key": "Project", "Value": "iot-system"}]
    (vpc,) = ec2.describe_vpcs(Filters=[{"Name": "tag:Project", "Values": ["iot-system"]}])["Vpcs"]
    inside = [{"Name": "vpc-id", "Values": [vpc["VpcId"]]}]
    subnet = ec2.describe_subnets(Filters=inside)["Subnets"][0]["SubnetId"]
    ec2.create_network_interface(SubnetId=subnet, Description="aws-K8S-i-0123456789abcdef0")
    group = ec2.create_security_group(
        GroupName="eks-cluster-sg-iot-system", Description="of EKS", VpcId=vpc["VpcId"]
    )["GroupId"]
    ec2.create_tags(
        Resources=[group], Tags=[{"Key": "aws:eks:cluster-name", "Value": "iot-system"}]
    )
    ec2.create_volume(
        AvailabilityZone=f"{region}a",
        Size=1,
        TagSpecifications=[{"ResourceType": "volume", "Tags": ours}],
    )


def test_teardown_deletes_one_region_and_nothing_else(deployed: Deployment) -> None:
    account, region = deployed.account, "us-east-1"
    other = Deployment(account, region)
    first = other.deploy()
    assert first.returncode == 0, first.output
    in_europe = deployed.left()
    unrelated = create_unrelated_resources(account, region)
    create_leftovers_of_a_cluster(account, region)
    # Teardown ignores resources that are already deleted.
    account.client("iot", region).delete_topic_rule(ruleName="iot_system_replay_1")
    account.scenario(
        log_groups_that_come_back=[
            "/aws/eks/iot-system/cluster",
            "/aws/rds/instance/iot-system/postgresql",
        ],
    )

    unconfirmed = other.run("teardown.yml", "--extra-vars=target=aws")
    assert unconfirmed.returncode == 2
    assert "-e confirm=true" in unconfirmed.output
    assert len(account.stacks(region)) == 5

    run = other.teardown()
    account.scenario()
    assert run.returncode == 0, run.output
    # The namespace is deleted before the cluster, so that its volumes are deleted.
    text = " ".join(run.output.split())
    assert "changed: [aws-account] => (item=iot-system)" in text
    assert text.index("(item=iot-system)") < text.index("DELETE_COMPLETE AWS::EKS::Cluster Cluster")
    assert "load balancers" not in text
    assert account.stacks(region) == {}
    kept = other.left()
    assert [line for line in kept if "PendingDeletion" not in line and "snapshot" not in line] == []
    assert [line for line in kept if line.startswith("rds: snapshot")]
    assert all(line in " ".join(run.output.split()) for line in kept)
    assert_unrelated_resources_exist(account, region, unrelated)
    assert deployed.left() == in_europe
    assert not (other.home / ".kube/iot-system-us-east-1").exists()

    again = other.teardown()
    assert (again.returncode, again.changed) == (0, 0), again.output


def test_remaining_resources_are_named_and_fail_the_teardown(account: Emulator) -> None:
    deployment = Deployment(account)
    tags = [{"ResourceType": "volume", "Tags": [{"Key": "Project", "Value": "iot-system"}]}]
    ec2 = account.client("ec2")
    volume = ec2.create_volume(AvailabilityZone="eu-west-1a", Size=1, TagSpecifications=tags)[
        "VolumeId"
    ]
    instance = ec2.run_instances(ImageId="ami-1", MinCount=1, MaxCount=1)["Instances"][0]
    ec2.attach_volume(VolumeId=volume, InstanceId=instance["InstanceId"], Device="/dev/sdf")
    # The load balancer of a Service that still exists. It is tagged by its controller.
    owned = [{"Key": "kubernetes.io/cluster/iot-system", "Value": "owned"}]
    balancer = account.client("elbv2").create_load_balancer(Name="k8s-service", Tags=owned)[
        "LoadBalancers"
    ][0]["LoadBalancerArn"]
    run = deployment.teardown()
    assert run.returncode == 2, run.output
    assert f"Volumes {volume}" in run.output
    assert f"elasticloadbalancing: {balancer.split(':', 5)[5]}" in run.output
    assert "Run the teardown again" in run.output
