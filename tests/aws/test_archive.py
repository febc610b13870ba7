"""`iot-collector archive` and `restore` with S3."""

from __future__ import annotations

import subprocess

import boto3

from testing.aws.emulator import KEYS, Emulator
from testing.collector import clean_environment, iot_collector
from testing.postgres import Database

REGION = "eu-west-1"
INSERT = (
    "SELECT ensure_partitions('2020-02-01 00:00+00', 0);"
    "INSERT INTO messages (received_at, topic, payload, qos, retained)"
    " SELECT '2020-02-02 00:00+00', 't', sha512(n::text::bytea), 1, false"
    " FROM generate_series(1, 300000) n"
)
CHECKSUM = "SELECT md5(string_agg(m::text, ',' ORDER BY id)) FROM messages m"


def test_month_is_archived_in_s3_and_restored(account: Emulator, database: Database) -> None:
    """The file is larger than 10 MiB, so it is uploaded in several parts."""
    s3 = boto3.client(
        "s3",
        endpoint_url=account.url,
        region_name=REGION,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )

    def run(
        command: str, target: str, *arguments: str, region: str = REGION
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [iot_collector(), command, *arguments],
            env=clean_environment()
            | database.environment()
            | KEYS
            | {
                "IOT_ARCHIVE_TARGET": target,
                "AWS_ENDPOINT_URL": account.url,
                "AWS_REGION": region,
                "AWS_EC2_METADATA_DISABLED": "true",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    database.query(INSERT)
    rows = database.query(CHECKSUM)
    missing = run("archive", "s3://iot-archive")
    assert missing.returncode == 1
    assert "create the bucket" in missing.stderr
    location = {"LocationConstraint": REGION}
    s3.create_bucket(Bucket="iot-archive", CreateBucketConfiguration=location)
    elsewhere = run("archive", "s3://iot-archive", region="us-east-1")
    assert "set AWS_REGION to the region of the bucket" in elsewhere.stderr
    assert database.count("messages_2020_02") == 300_000

    done = run("archive", "s3://iot-archive/plant/berlin")
    assert done.returncode == 0, done.stderr
    assert database.count() == 0
    found = s3.list_objects_v2(Bucket="iot-archive")["Contents"]
    sizes = [(entry["Key"], entry["Size"] > 10 << 20) for entry in found]
    # pyarrow leaves an empty object with a trailing slash when it deletes the last file.
    assert [(key, large) for key, large in sizes if not key.endswith("/")] == [
        ("plant/berlin/messages_2020_02.json", False),
        ("plant/berlin/messages_2020_02.parquet", True),
    ]
    done = run("restore", "s3://iot-archive/plant/berlin", "2020-02")
    assert done.returncode == 0, done.stderr
    assert database.query(CHECKSUM) == rows
