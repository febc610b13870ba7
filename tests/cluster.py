"""A stand-in for a cluster, and the project's playbooks run against it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import kubernetes
from ansible_runs import playbook
from kubernetes.dynamic import DynamicClient

from testing.kubernetes_api.process import StandIn

Object = dict[str, Any]

NAMESPACE = "iot-system"


class Cluster:
    """A stand-in, and the playbooks that are run against it."""

    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in = stand_in
        configuration = kubernetes.config.new_client_from_config(str(stand_in.kubeconfig))
        self.client = DynamicClient(configuration)

    def run(
        self, name: str, *arguments: str, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a playbook; `minikube_enabled` and the image are as for a cluster of one's own."""
        given = {
            "target": "local",
            "minikube_enabled": False,
            "kubeconfig": str(self.stand_in.kubeconfig),
            "collector_image": "iot-collector:test",
            **variables,
        }
        return playbook(f"playbooks/{name}.yml", "-e", json.dumps(given), *arguments)

    def objects(self, kind: str | None = None) -> list[Object]:
        """What the playbook has applied, as it did."""
        found: list[Object] = self.stand_in.ask("objects")
        return [o for o in found if kind in (None, o["kind"])]

    def object(self, kind: str, name: str) -> Object:
        (found,) = (o for o in self.objects(kind) if o["metadata"]["name"] == name)
        return found

    def revisions(self) -> dict[str, str]:
        """The revision that the pods of each component have: another one means new pods."""
        sets = self.client.resources.get(kind="StatefulSet").get(namespace=NAMESPACE)
        return {s.metadata.name: s.status.updateRevision for s in sets.items}


def pod_spec(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec
