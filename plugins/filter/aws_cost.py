"""The filter ``iot.platform.aws_cost``: the monthly cost of a deployment on AWS."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ansible.errors import AnsibleFilterError

DOCUMENTATION = """
name: aws_cost
short_description: The monthly cost of a deployment on AWS, at list prices
description:
  - Computes the cost of each part from the inventory's values, the prices and the expected usage.
  - The database grows with each message, so the result is the mean of several months.
positional: table, usage
options:
  _input:
    description: Variables of the roles that run on AWS, by name.
    type: dict
    required: true
  table:
    description: Prices, assumptions and options, as in roles/aws_cost/files/prices.yml.
    type: dict
    required: true
  usage:
    description:
      - C(devices) that are always connected, C(messages) per month and the number of C(months).
      - Optionally C(keep_months) of rows in the database, C(reserved) for reserved nodes and
        database, and C(messages_factor) to multiply C(messages) with.
    type: dict
    required: true
"""
EXAMPLES = """
- ansible.builtin.debug:
    msg: "{{ (settings | iot.platform.aws_cost(table, usage)).total }}"
  vars:
    usage: {devices: 100, messages: 1000000, months: 12}
"""
RETURN = """
_value:
  description:
    - C(total), C(first_month) and C(last_month) in USD per month.
    - C(lines), a list of C(what), C(quantity) and C(usd).
    - C(options), a list of C(what), C(how) and C(change) in USD per month.
    - C(notes), a list of messages about parts that are missing in the total or exceed a limit.
  type: dict
"""

Json = dict[str, Any]
MILLION = 1_000_000
GIB = 1024**3


class Line(NamedTuple):
    """A line of the bill; ``usd`` is the cost of one month, or the mean of several."""

    what: str
    quantity: str
    usd: float


class Estimate:
    """The bill of any month of one deployment."""

    def __init__(self, settings: Json, table: Json, usage: Json) -> None:
        self.settings, self.table, self.usage = settings, table, usage
        self.assume: Json = table["assumptions"]
        self.hours: float = self.assume["hours"]
        self.messages = usage["messages"] * usage.get("messages_factor", 1)
        self.zones = len(settings["network_zones"]) or int(settings["network_zone_count"])
        self.notes: list[str] = []
        self.full_in: int | None = None  # the first month in which the storage does not suffice

    def price(self, name: str) -> float:
        return float(self.table["prices"][name]["usd"])

    def hourly(self, kind: str, name: str, variable: str) -> float:
        """USD per hour of an instance type or class; 0 and a note if the table lacks it."""
        known: Json = self.table[kind]
        if name in known:
            return float(known[name]["usd"])
        note = f"{variable}: {name} is not in the price table, so it is missing in the total"
        if note not in self.notes:
            self.notes.append(note)
        return 0

    def discount(self, name: str) -> float:
        return 1 - float(self.table["discounts"][name]["part"])

    def stored_gib(self, month: int) -> float:
        """Size of the table at the end of a month, in GiB."""
        kept = min(month, self.usage.get("keep_months") or month)
        return float(kept * self.messages * self.assume["stored_bytes"] / GIB)

    def allocated_gib(self, month: int) -> int:
        """Storage that RDS has at the end of a month, in GiB."""
        wanted = math.ceil(self.stored_gib(month) / self.assume["storage_used_at_most"])
        limit = int(self.settings["rds_max_storage_gib"])
        if wanted > limit:
            self.full_in = min(month, self.full_in or month)
        return int(max(int(self.settings["rds_storage_gib"]), min(wanted, limit)))

    def month(self, month: int) -> Iterator[Line]:
        """Each line of the bill of a month, counted from 1."""
        yield from self.cluster()
        yield from self.database(month)
        yield from self.network()
        yield from self.iot_core()
        yield from self.rest(month)

    def cluster(self) -> Iterator[Line]:
        extended = self.settings["eks_support_type"] == "EXTENDED"
        hour = self.price("eks_cluster_hour_extended" if extended else "eks_cluster_hour")
        yield Line("EKS control plane", f"{self.hours} h", hour * self.hours)
        count, types = int(self.settings["eks_nodes_min"]), self.settings["eks_instance_types"]
        hour = max(self.hourly("instances", one, "eks_instance_types") for one in types)
        spot = self.settings["eks_capacity_type"] == "SPOT"
        if spot:
            hour *= self.discount("spot")
        elif self.usage.get("reserved"):
            hour *= self.discount("reserved_nodes")
        name = f"{count} x {' or '.join(types)}{', spot' if spot else ''}"
        yield Line("Nodes", name, count * hour * self.hours)
        gib = count * int(self.settings["eks_node_disk_gib"]) + self.assume["volumes_gib"]
        yield Line("EBS gp3", f"{gib} GiB", gib * self.price("ebs_gp3_gib_month"))

    def database(self, month: int) -> Iterator[Line]:
        name, copies = (
            self.settings["rds_instance_class"],
            2 if self.settings["rds_multi_az"] else 1,
        )
        hour = copies * self.hourly("databases", name, "rds_instance_class")
        if self.usage.get("reserved"):
            hour *= self.discount("reserved_database")
        zones = "two zones" if copies == 2 else "one zone"
        yield Line("RDS for PostgreSQL", f"{name} in {zones}", hour * self.hours)
        allocated, months = self.allocated_gib(month), int(self.usage["months"])
        grows = f"{self.allocated_gib(1)} to {self.allocated_gib(months)} GiB in {zones}"
        price = self.price("rds_gp3_gib_month")
        yield Line("RDS storage gp3", grows, copies * allocated * price)
        # Backups as large as the storage are free.
        daily = self.messages * self.assume["stored_bytes"] / GIB / 30
        changes = int(self.settings["rds_backup_days"]) * daily * self.assume["write_ahead_factor"]
        beyond = max(0.0, self.stored_gib(month) + changes - allocated)
        days = f"{self.settings['rds_backup_days']} days, beyond the size of the storage"
        yield Line("RDS backups", days, beyond * self.price("rds_backup_gib_month"))
        if self.settings["rds_insights_mode"] == "advanced":
            vcpus = copies * self.table["databases"].get(name, {}).get("vcpus", 2)
            usd = vcpus * self.hours * self.price("rds_insights_advanced_vcpu_hour")
            yield Line("Database Insights", f"{vcpus} vCPUs", usd)

    def network(self) -> Iterator[Line]:
        count = self.zones if self.settings["network_nat_gateways"] == "per-zone" else 1
        hour = self.price("nat_hour") + self.price("public_ipv4_hour")
        messages_gb = self.messages * self.assume["network_bytes"] / 1e9
        other = self.assume["nat_other_gb"]
        if self.settings["network_interface_endpoints"]:
            endpoints = self.assume["endpoints"] * self.zones
            usd = endpoints * self.hours * self.price("endpoint_zone_hour")
            usd += other * self.price("endpoint_gb")
            yield Line("Interface endpoints", f"{endpoints}, {other} GB", usd)
            other = 0
        gb = messages_gb + other
        usd = count * hour * self.hours + gb * self.price("nat_gb")
        yield Line("NAT gateway with address", f"{count}, {gb:.0f} GB", usd)
        # In the worst case, a message crosses zones on its way to the NAT gateway and again to the
        # database. Each crossing is charged in both directions.
        usd = 4 * messages_gb * self.price("transfer_zones_gb")
        usd += self.assume["internet_gb"] * self.price("transfer_internet_gb")
        yield Line("Data transfer", f"between zones, {self.assume['internet_gb']} GB out", usd)

    def iot_core(self) -> Iterator[Line]:
        devices = int(self.usage["devices"])
        minutes = devices * self.hours * 60 / MILLION
        usd = minutes * self.price("iot_minutes_million")
        yield Line("IoT Core connections", f"{minutes:.0f} million minutes", usd)
        messages = self.messages / MILLION
        metered = messages * self.assume["metered_messages"]
        usd = metered * self.price("iot_messages_million")
        yield Line("IoT Core messages", f"{metered:g} million", usd)
        if self.settings["iot_core_replay"]:
            usd = messages * (self.price("iot_rules_million") + self.price("iot_actions_million"))
            yield Line("IoT Core rule", f"{messages:g} million, an action each", usd)
            usd = messages * self.price("sqs_requests_million")
            yield Line("SQS", f"{messages:g} million requests", usd)

    def rest(self, month: int) -> Iterator[Line]:
        settings, assume = self.settings, self.assume
        flow = assume["flow_log_gb"][settings["network_flow_log_traffic"]]
        seconds = int(settings["rds_monitoring_seconds"])
        monitoring = assume["monitoring_gb_at_60_s"] * 60 / seconds
        kept = [
            (assume["audit_log_gb"], settings["eks_log_retention_days"]),
            (flow, settings["network_log_retention_days"]),
            (assume["database_log_gb"], settings["rds_log_retention_days"]),
            (monitoring, 30),  # AWS sets the retention of the log group RDSOSMetrics
        ]
        gb = sum(one for one, _ in kept)
        stored = sum(one * min(month, int(days) / 30) for one, days in kept)
        usd = gb * self.price("logs_ingest_gb") + stored * self.price("logs_storage_gb_month")
        yield Line("CloudWatch Logs", f"{gb:.0f} GB", usd)
        if settings["cloudwatch_exporter_enabled"]:
            metrics = assume["cloudwatch_metrics"]
            thousands = metrics * assume["cloudwatch_rounds_hour"] * self.hours / 1000
            usd = thousands * self.price("cloudwatch_requests_1000")
            yield Line("CloudWatch requests", f"{metrics} metrics", usd)
        images = int(settings["ecr_keep_images"]) * assume["image_gb"]
        yield Line("ECR", f"{images:.0f} GB", images * self.price("ecr_gb_month"))
        yield Line("KMS", f"{assume['keys']} keys", assume["keys"] * self.price("kms_key_month"))
        usd = assume["secrets"] * self.price("secret_month")
        usd += assume["secret_calls"] / 10_000 * self.price("secret_calls_10000")
        yield Line("Secrets Manager", f"{assume['secrets']} secrets", usd)
        if keep := self.usage.get("keep_months"):
            gb = max(0, month - keep) * self.messages * assume["archived_bytes"] / 1e9
            yield Line("S3 archive", "the months before", gb * self.price("s3_gb_month"))

    def mean(self) -> list[Line]:
        """Each line as the mean of all months."""
        months = int(self.usage["months"])
        bills = [list(self.month(number)) for number in range(1, months + 1)]
        return [
            Line(lines[0].what, lines[0].quantity, sum(line.usd for line in lines) / months)
            for lines in zip(*bills, strict=True)
        ]


def total(lines: list[Line]) -> float:
    return sum(line.usd for line in lines)


def aws_cost(settings: Json, table: Json, usage: Json) -> Json:
    """Return the estimate; DOCUMENTATION has the arguments and the result."""
    for name in ("devices", "messages", "months"):
        value = usage.get(name)
        if not isinstance(value, (int, float)) or value < 1:
            raise AnsibleFilterError(f"aws_cost: {name} is {value!r}, but has to be 1 or more")
    try:
        estimate = Estimate(settings, table, usage)
        lines = estimate.mean()
        options = [
            {
                "what": option["what"],
                "how": option.get("settings", {}),
                "change": total(
                    Estimate(
                        settings | option.get("settings", {}),
                        table,
                        usage | option.get("usage", {}),
                    ).mean()
                )
                - total(lines),
            }
            for option in table["options"]
        ]
    except KeyError as error:
        raise AnsibleFilterError(f"aws_cost: {error.args[0]} is missing or unknown") from error
    if estimate.full_in:
        limit = settings["rds_max_storage_gib"]
        estimate.notes.append(
            f"rds_max_storage_gib: {limit} GiB are full in month {estimate.full_in}"
        )
    return {
        "total": total(lines),
        "first_month": total(list(estimate.month(1))),
        "last_month": total(list(estimate.month(int(usage["months"])))),
        "lines": [line._asdict() for line in lines],
        "options": options,
        "notes": estimate.notes,
    }


class FilterModule:
    """The filter ``aws_cost``."""

    def filters(self) -> Json:
        return {"aws_cost": aws_cost}
