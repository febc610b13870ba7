"""What the controllers of a cluster make out of the objects, in one pass after every write.

Nothing takes time: what will be ready is ready by the next read.
"""

import json
from collections import Counter
from copy import deepcopy
from hashlib import sha256
from typing import Any

from . import defaults, pods
from .kinds import BY_NAME
from .store import Store, kind_of, now

Object = dict[str, Any]


class Controllers:
    """Controllers, scheduler and kubelet. `never_ready` maps a workload, pod, or workload/container
    to one of `pods.REASONS`; whoever changes it calls `reconcile` afterwards."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.never_ready: dict[str, str] = {}
        for name in ("default", "kube-system"):
            self._create("Namespace", "", name)
        self._create("Node", "", pods.NODE)
        default = {"annotations": {defaults.DEFAULT_CLASS: "true"}}
        self._create("StorageClass", "", "standard", default, provisioner="k8s.io/hostpath")
        self.reconcile()

    def reconcile(self) -> None:
        store = self._store
        store.collect_garbage()
        for namespace in store.select("Namespace"):
            if "deletionTimestamp" in namespace["metadata"]:
                self.terminate(namespace)
            else:
                store.set_status(namespace, phase="Active")
                name = namespace["metadata"]["name"]
                if not store.get("ServiceAccount", name, "default"):
                    self._create("ServiceAccount", name, "default")
        for claim in store.select("PersistentVolumeClaim"):
            self._claim(claim)
        for stateful_set in store.select("StatefulSet"):
            self._stateful_set(stateful_set)
        for job in store.select("Job"):
            self._job(job)
        for pod in store.select("Pod"):
            self._run(pod)

    def _create(
        self, kind: str, namespace: str, name: str, metadata: Object | None = None, **rest: Any
    ) -> Object:
        meta = {"name": name} | ({"namespace": namespace} if namespace else {}) | (metadata or {})
        api_version = BY_NAME[kind].api_version
        obj = {"apiVersion": api_version, "kind": kind, "metadata": meta, **deepcopy(rest)}
        self._store.stamp(obj)
        defaults.fill(obj)
        return self._store.put(obj)

    def _warn(self, about: Object, reason: str, message: str) -> None:
        """Make one event of a sort about an object; repetitions are not counted."""
        meta = about["metadata"]
        name = f"{meta['name']}.{_hash([meta['uid'], reason, message])}"
        if self._store.get("Event", meta["namespace"], name):
            return
        self._create(
            *("Event", meta["namespace"], name),
            involvedObject={k: about[k] for k in ("apiVersion", "kind")}
            | {k: meta[k] for k in ("name", "namespace", "uid")},
            reason=reason,
            message=message,
            type="Warning",
            firstTimestamp=now(),
            lastTimestamp=now(),
        )

    # --- namespaces and claims -----------------------------------------------------------------

    def terminate(self, namespace: Object) -> None:
        """Delete what is in a namespace. What has finalizers keeps the namespace Terminating.

        Without such, the namespace stays Terminating until it was read once (`finish`).
        """
        store, name = self._store, namespace["metadata"]["name"]
        for obj in store.select(namespace=name):
            store.remove(obj)
        left = store.select(namespace=name)
        marked = deepcopy(namespace)
        since = marked["metadata"].setdefault("deletionTimestamp", now())
        marked["status"] = {"phase": "Terminating"}
        if left:
            counts = Counter(f"{kind_of(o).plural}.{kind_of(o).group}" for o in left)
            holds = Counter(f for obj in left for f in obj["metadata"]["finalizers"])
            has = ", ".join(f"{r} has {n} resource instances" for r, n in sorted(counts.items()))
            held = ", ".join(f"{f} in {n} resource instances" for f, n in sorted(holds.items()))
            remain = f"Some content in the namespace has finalizers remaining: {held}"
            marked["status"]["conditions"] = [
                _true("NamespaceContentRemaining", since, f"Some resources are remaining: {has}"),
                _true("NamespaceFinalizersRemaining", since, remain),
            ]
        store.put(marked)

    def finish(self, namespace: Object) -> None:
        """A Terminating namespace was read: it is gone now if it is empty."""
        name = namespace["metadata"]["name"]
        if "deletionTimestamp" in namespace["metadata"] and not self._store.select(namespace=name):
            self._store.remove(namespace)

    def _claim(self, claim: Object) -> None:
        """Bind a claim if its class, or a default class, is there. There are no volumes."""
        claim = deepcopy(claim)
        for known in self._store.select("StorageClass"):
            if known["metadata"].get("annotations", {}).get(defaults.DEFAULT_CLASS) == "true":
                claim["spec"].setdefault("storageClassName", known["metadata"]["name"])
        wanted = claim["spec"].get("storageClassName", "")
        bound = claim.get("status", {}).get("phase") == "Bound"
        if not bound and self._store.get("StorageClass", "", wanted) is None:
            message = f'storageclass.storage.k8s.io "{wanted}" not found'
            self._warn(claim, "ProvisioningFailed", message)
            self._store.set_status(claim, phase="Pending")
        else:
            capacity = claim["spec"].get("resources", {}).get("requests", {})
            self._store.set_status(claim, phase="Bound", capacity=capacity)

    # --- pods ----------------------------------------------------------------------------------

    def _make_pod(self, owner: Object, name: str, labels: Object, **extra: Any) -> Object | None:
        """Make a pod of a controller; None (and an event) when its service account is missing."""
        template, namespace = deepcopy(owner["spec"]["template"]), owner["metadata"]["namespace"]
        account = template["spec"].get("serviceAccountName", "default")
        if self._store.get("ServiceAccount", namespace, account) is None:
            why = f"error looking up service account {namespace}/{account}: not found"
            self._warn(owner, "FailedCreate", f'create Pod {name} failed: pods "{name}": {why}')
            return None
        meta = template.get("metadata", {})
        meta["labels"] = meta.get("labels", {}) | labels
        meta["ownerReferences"] = [
            {k: owner[k] for k in ("apiVersion", "kind")}
            | {k: owner["metadata"][k] for k in ("name", "uid")}
            | {"controller": True}
        ]
        spec = template["spec"] | extra
        return self._run(self._create("Pod", namespace, name, meta, spec=spec))

    def _run(self, pod: Object) -> Object:
        """Bring a pod's status up to date. One that ran keeps running, unless told otherwise."""
        if pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}:
            return pod
        trouble = self._told(pod)
        if trouble is None and not pods.is_ready(pod):
            trouble = pods.lacking(self._store, pod)
        for event in trouble.events if trouble else ():
            self._warn(pod, *event)
        return self._store.put(deepcopy(pod) | {"status": pods.status(pod, trouble)})

    def _told(self, pod: Object) -> pods.Trouble | None:
        meta = pod["metadata"]
        names = {meta["name"], *(ref["name"] for ref in meta.get("ownerReferences", []))}
        for rule, reason in self.never_ready.items():
            name, _, container = rule.partition("/")
            if name in names:
                return pods.told(pod, container, reason)
        return None

    # --- workloads -----------------------------------------------------------------------------

    def _stateful_set(self, owner: Object) -> None:
        """Make all pods at once (podManagementPolicy Parallel, whatever the manifest says).

        A rolling update replaces the highest ordinal first and stops at one that does not become
        ready.
        """
        store, spec, meta = self._store, owner["spec"], owner["metadata"]
        revision = f"{meta['name']}-{_hash(spec['template'])}"
        names = [f"{meta['name']}-{ordinal}" for ordinal in range(spec["replicas"])]
        for old in store.owned(owner, "Pod"):
            if old["metadata"]["name"] not in names:
                store.remove(old)
        here: dict[str, Object] = {}
        replaced_all = True
        for name in reversed(names):
            found = store.get("Pod", meta["namespace"], name)
            if found and replaced_all and _revision(found) != revision:
                store.remove(found)
                found = None
            pod = self._run(found) if found else self._replica(owner, name, revision)
            replaced_all = replaced_all and pod is not None and pods.is_ready(pod)
            here |= {name: pod} if pod else {}
        ready = sum(map(pods.is_ready, here.values()))
        updated = sum(_revision(pod) == revision for pod in here.values())
        complete = updated == ready == len(here) == spec["replicas"]
        current = owner.get("status", {}).get("currentRevision", revision)
        status = {
            "observedGeneration": meta["generation"],
            "replicas": len(here),
            "readyReplicas": ready,
            "updatedReplicas": updated,
            "currentRevision": revision if complete else current,
            "updateRevision": revision,
        }
        # Counts of zero are left out.
        store.put(deepcopy(owner) | {"status": {k: v for k, v in status.items() if v != 0}})

    def _replica(self, owner: Object, name: str, revision: str) -> Object | None:
        spec, namespace = owner["spec"], owner["metadata"]["namespace"]
        templates = {c["metadata"]["name"]: c for c in spec.get("volumeClaimTemplates", [])}
        volumes = list(spec["template"]["spec"].get("volumes", []))
        for template_name, template in templates.items():
            claim = f"{template_name}-{name}"
            volumes.append({"name": template_name, "persistentVolumeClaim": {"claimName": claim}})
            if self._store.get("PersistentVolumeClaim", namespace, claim) is None:
                labels = template["metadata"].get("labels", {}) | spec["selector"]["matchLabels"]
                described = template["metadata"] | {"labels": labels, "name": claim}
                kind = "PersistentVolumeClaim"
                self._claim(self._create(kind, namespace, claim, described, spec=template["spec"]))
        labels = {
            "statefulset.kubernetes.io/pod-name": name,
            "controller-revision-hash": revision,
        }
        return self._make_pod(owner, name, labels, hostname=name, volumes=volumes)

    def _job(self, owner: Object) -> None:
        """Make all the pods at once; the first attempt decides."""
        spec, meta = owner["spec"], owner["metadata"]
        if owner.get("status", {}).get("conditions"):
            return
        here = [self._run(pod) for pod in self._store.owned(owner, "Pod")]
        for number in range(len(here), spec["completions"]):
            pod = self._make_pod(owner, f"{meta['name']}-{_hash([meta['uid'], number])[:5]}", {})
            here += [pod] if pod else []
        phases = [pod["status"]["phase"] for pod in here]
        counts = {"succeeded": phases.count("Succeeded"), "failed": phases.count("Failed")}
        since = meta["creationTimestamp"]
        status: Object = {"startTime": since} | {name: n for name, n in counts.items() if n}
        if counts["failed"]:
            self._warn(owner, "BackoffLimitExceeded", "Job has reached the backoff limit")
            status["conditions"] = [_true("Failed", since, "Job has reached the backoff limit")]
        elif counts["succeeded"] == spec["completions"]:
            status |= {"completionTime": since, "conditions": [_true("Complete", since, "")]}
        self._store.put(deepcopy(owner) | {"status": status})


def _true(kind: str, since: str, message: str) -> Object:
    return {"type": kind, "status": "True", "lastTransitionTime": since, "message": message}


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _revision(pod: Object) -> str:
    revision: str = pod["metadata"]["labels"]["controller-revision-hash"]
    return revision
