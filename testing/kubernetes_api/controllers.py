"""What the controllers of a cluster make out of the objects, in one pass after every write.

Nothing takes time: what will be ready is ready by the next read. What is kept of the order of
things decides whether a deployment comes through at all, see `Controllers._stateful_set`.
"""

import json
from collections import Counter
from copy import deepcopy
from hashlib import sha256
from typing import Any

from . import defaults, pods
from .errors import ApiError, forbidden
from .kinds import BY_NAME
from .pod_security import violation
from .store import Store, kind_of, now

Object = dict[str, Any]

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


class Controllers:
    """Controllers, scheduler and kubelet. `never_ready` maps a workload, pod, or workload/container
    to one of `pods.REASONS`; whoever changes it calls `reconcile` afterwards."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.never_ready: dict[str, str] = {}

    def set_up(self) -> None:
        """What a fresh minikube cluster has before anybody uses it."""
        for name in ("default", "kube-node-lease", "kube-public", "kube-system"):
            self._create("Namespace", "", name, status={"phase": "Active"})
        capacity = {"cpu": "2", "memory": "4Gi", "pods": "110"}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
        self._create("Node", "", pods.NODE, status=status)
        default = {"annotations": {_DEFAULT_CLASS: "true"}}
        provisioner = "k8s.io/minikube-hostpath"
        self._create("StorageClass", "", "standard", default, provisioner=provisioner)
        self.reconcile()

    def reconcile(self) -> None:
        store = self._store
        store.collect_garbage()
        for namespace in store.select("Namespace"):
            if "deletionTimestamp" in namespace["metadata"]:
                self.terminate(namespace)
            else:
                self._namespace(namespace)
        for claim in store.select("PersistentVolumeClaim"):
            self._claim(claim)
        for deployment in store.select("Deployment"):
            self._deployment(deployment)
        for replica_set in store.select("ReplicaSet"):
            self._replica_set(replica_set)
        for deployment in store.select("Deployment"):
            self._deployment_status(deployment)
        for stateful_set in store.select("StatefulSet"):
            self._stateful_set(stateful_set)
        for job in store.select("Job"):
            self._job(job)
        for pod in store.select("Pod"):
            self._run(pod)
        for quota in store.select("ResourceQuota"):
            hard = quota.get("spec", {}).get("hard", {})
            used = str(len(store.select("Pod", quota["metadata"]["namespace"])))
            store.set_status(quota, hard=hard, used={k: used for k in hard if k == "pods"})
        uids = {claim["metadata"]["uid"] for claim in store.select("PersistentVolumeClaim")}
        for volume in store.select("PersistentVolume"):
            reference = volume.get("spec", {}).get("claimRef")
            if reference and reference.get("uid") not in uids:
                store.remove(volume)

    # --- what every controller needs -----------------------------------------------------------

    def _create(
        self, kind: str, namespace: str, name: str, metadata: Object | None = None, **rest: Any
    ) -> Object:
        meta = {"name": name} | ({"namespace": namespace} if namespace else {}) | (metadata or {})
        known = BY_NAME[kind]
        obj = {"apiVersion": known.api_version, "kind": kind, "metadata": meta, **deepcopy(rest)}
        self._store.stamp(obj)
        defaults.fill(known, obj)
        return self._store.put(obj)

    def _event(self, about: Object, kind: str, reason: str, message: str, source: str) -> None:
        """One event of a sort about an object; repetitions are not counted."""
        meta = about["metadata"]
        name = f"{meta['name']}.{_hash([meta['uid'], reason, message], 16)}"
        if self._store.get("Event", meta["namespace"], name):
            return
        named = {k: meta[k] for k in ("name", "namespace", "uid")}
        self._create(
            *("Event", meta["namespace"], name),
            involvedObject={"apiVersion": about["apiVersion"], "kind": about["kind"], **named},
            reason=reason,
            message=message,
            type=kind,
            source={"component": source},
            reportingComponent=source,
            reportingInstance="",
            count=1,
            firstTimestamp=now(),
            lastTimestamp=now(),
        )

    # --- namespaces ----------------------------------------------------------------------------

    def _namespace(self, namespace: Object) -> None:
        self._store.set_status(namespace, phase="Active")
        name = namespace["metadata"]["name"]
        if not self._store.get("ServiceAccount", name, "default"):
            self._create("ServiceAccount", name, "default")
            self._create("ConfigMap", name, "kube-root-ca.crt", data={"ca.crt": ""})

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
                _true(kind, since, reason, message)
                for kind, reason, message in (
                    (
                        *("NamespaceContentRemaining", "SomeResourcesRemain"),
                        f"Some resources are remaining: {has}",
                    ),
                    ("NamespaceFinalizersRemaining", "SomeFinalizersRemain", remain),
                )
            ]
        store.put(marked)

    def finish(self, namespace: Object) -> None:
        """A Terminating namespace was read: it is gone now if it is empty."""
        name = namespace["metadata"]["name"]
        if "deletionTimestamp" in namespace["metadata"] and not self._store.select(namespace=name):
            self._store.remove(namespace)

    # --- storage -------------------------------------------------------------------------------

    def set_storage_class(self, claim: Object) -> None:
        for known in self._store.select("StorageClass"):
            if known["metadata"].get("annotations", {}).get(_DEFAULT_CLASS) == "true":
                claim["spec"].setdefault("storageClassName", known["metadata"]["name"])

    def _claim(self, claim: Object) -> None:
        """Bind a claim to a volume made for it, whatever its class's volumeBindingMode.

        A bound one whose size was changed grows at once, with its volume.
        """
        if claim.get("status", {}).get("phase") == "Bound":
            capacity = {"storage": claim["spec"]["resources"]["requests"]["storage"]}
            self._store.set_status(claim, capacity=capacity)
            if volume := self._store.get("PersistentVolume", "", claim["spec"]["volumeName"]):
                grown = deepcopy(volume)
                grown["spec"]["capacity"] = capacity
                self._store.put(grown)
            return
        claim = deepcopy(claim)
        self.set_storage_class(claim)
        spec, meta = claim["spec"], claim["metadata"]
        wanted = spec.get("storageClassName", "")
        known = self._store.get("StorageClass", "", wanted)
        if known is None:
            kind, reason = (
                ("Warning", "ProvisioningFailed") if wanted else ("Normal", "FailedBinding")
            )
            message = "no persistent volumes available for this claim and no storage class is set"
            if wanted:
                message = f'storageclass.storage.k8s.io "{wanted}" not found'
            self._event(claim, kind, reason, message, "persistentvolume-controller")
            self._store.set_status(claim, phase="Pending")
            return
        spec["volumeName"] = f"pvc-{meta['uid']}"
        capacity = {"storage": spec["resources"]["requests"]["storage"]}
        reference = {"kind": "PersistentVolumeClaim", "apiVersion": "v1"}
        volume_spec = {
            "capacity": capacity,
            "accessModes": spec["accessModes"],
            "storageClassName": wanted,
            "persistentVolumeReclaimPolicy": known["reclaimPolicy"],
            "claimRef": reference | {k: meta[k] for k in ("namespace", "name", "uid")},
        }
        status = {"phase": "Bound"}
        self._create("PersistentVolume", "", spec["volumeName"], spec=volume_spec, status=status)
        self._store.set_status(
            claim, phase="Bound", capacity=capacity, accessModes=spec["accessModes"]
        )

    def admit_resize(self, old: Object, new: Object) -> None:
        """Refuse another size (403) for a claim whose class does not let volumes grow."""
        if old["spec"]["resources"] == new["spec"]["resources"]:
            return
        known = self._store.get("StorageClass", "", old["spec"].get("storageClassName", ""))
        if not (known or {}).get("allowVolumeExpansion"):
            why = (
                "only dynamically provisioned pvc can be resized and the storageclass that "
                "provisions the pvc must support resize"
            )
            raise forbidden(BY_NAME["PersistentVolumeClaim"], old["metadata"]["name"], why)

    # --- pods ----------------------------------------------------------------------------------

    def admit(self, pod: Object) -> None:
        """Refuse a pod (403) for its service account, the Pod Security Standard or a quota."""
        store, spec, kind = self._store, pod["spec"], BY_NAME["Pod"]
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        account = spec["serviceAccountName"]
        if store.get("ServiceAccount", namespace, account) is None:
            why = (
                f"error looking up service account {namespace}/{account}: "
                f'serviceaccount "{account}" not found'
            )
            raise forbidden(kind, name, why)
        if broken := violation(store.get("Namespace", "", namespace) or {}, "enforce", spec):
            raise forbidden(kind, name, broken)
        used = len(store.select("Pod", namespace))
        for quota in store.select("ResourceQuota", namespace):
            limit = quota.get("spec", {}).get("hard", {}).get("pods")
            if limit is not None and used >= int(limit):
                quota_name = quota["metadata"]["name"]
                why = f"exceeded quota: {quota_name}, requested: pods=1, used: pods={used}, "
                raise forbidden(kind, name, f"{why}limited: pods={limit}")

    def _make_pod(self, owner: Object, name: str, labels: Object, extra: Object) -> Object | None:
        """A pod of a controller, running if it can; None (and an event) when it is not admitted."""
        meta, template = owner["metadata"], deepcopy(owner["spec"]["template"])
        described = template.get("metadata", {})
        described["labels"] = described.get("labels", {}) | labels
        described["ownerReferences"] = [_owner_reference(owner)]
        described |= {"name": name, "namespace": meta["namespace"]}
        spec = template["spec"] | extra
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": described, "spec": spec}
        controller = f"{owner['kind'].lower()}-controller"
        self._store.stamp(pod)
        defaults.fill(BY_NAME["Pod"], pod)
        stateful = owner["kind"] == "StatefulSet"
        create = f"create Pod {name} in StatefulSet {meta['name']}"
        try:
            self.admit(pod)
        except ApiError as refusal:
            text = f"{create} failed error: {refusal}" if stateful else f"Error creating: {refusal}"
            self._event(owner, "Warning", "FailedCreate", text, controller)
            return None
        text = f"{create} successful" if stateful else f"Created pod: {name}"
        self._event(owner, "Normal", "SuccessfulCreate", text, controller)
        return self._run(self._store.put(pod))

    def _run(self, pod: Object) -> Object:
        """Bring a pod's status up to date. One that ran keeps running, unless told otherwise."""
        phase = pod.get("status", {}).get("phase")
        if phase in {"Succeeded", "Failed"}:
            return pod
        trouble = self._told(pod)
        if trouble is None and not pods.is_running(pod):
            trouble = pods.found(self._store, pod)
        scheduled = trouble is None or trouble.reason != "Unschedulable"
        for event in trouble.events if trouble else []:
            source = "kubelet" if scheduled else "default-scheduler"
            self._event(pod, "Warning", *event, source)
        pod = deepcopy(pod)
        if scheduled and "nodeName" not in pod["spec"]:
            pod["spec"]["nodeName"] = pods.NODE
            named = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
            text = f"Successfully assigned {named} to {pods.NODE}"
            self._event(pod, "Normal", "Scheduled", text, "default-scheduler")
        finishes = pod["spec"]["restartPolicy"] != "Always"
        return self._store.put(pod | {"status": pods.status(pod, trouble, finishes)})

    def _told(self, pod: Object) -> pods.Trouble | None:
        refs = pod["metadata"].get("ownerReferences", [])
        names = {pod["metadata"]["name"], *(r["name"] for r in refs)}
        names |= {r["name"].rpartition("-")[0] for r in refs if r["kind"] == "ReplicaSet"}
        for rule, reason in self.never_ready.items():
            name, _, container = rule.partition("/")
            if name in names:
                return pods.told(pod, container, reason)
        return None

    # --- workloads -----------------------------------------------------------------------------

    def _stateful_set(self, owner: Object) -> None:
        """Pods in order, each once the one before is ready, unless podManagementPolicy is Parallel.

        A rolling update replaces the highest ordinal first and stops at one that does not get
        ready. With OrderedReady, a pod that is not ready also keeps a corrected template from
        reaching it, until somebody deletes the pod:
        https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#forced-rollback
        """
        store, spec, meta = self._store, owner["spec"], owner["metadata"]
        revision = f"{meta['name']}-{_hash(spec['template'])}"
        first = spec.get("ordinals", {}).get("start", 0)
        ordinals = range(first, first + spec["replicas"])
        names = {ordinal: f"{meta['name']}-{ordinal}" for ordinal in ordinals}
        self._adopt(owner)
        for pod in store.owned(owner, "Pod"):
            if pod["metadata"]["name"] not in names.values():
                store.remove(pod)
        here: dict[int, Object] = {}
        go_on = True
        for ordinal, name in names.items():
            known = store.get("Pod", meta["namespace"], name)
            if known or go_on:
                replica = self._run(known) if known else self._replica(owner, ordinal, revision)
                here |= {ordinal: replica} if replica else {}
            parallel = spec["podManagementPolicy"] == "Parallel"
            go_on = parallel or (go_on and ordinal in here and pods.is_ready(here[ordinal]))
        if go_on and spec["updateStrategy"]["type"] == "RollingUpdate":
            self._roll(owner, here, revision)
        ready = sum(pods.is_ready(pod) for pod in here.values())
        updated = sum(_revision(pod) == revision for pod in here.values())
        complete = updated == ready == len(here) == spec["replicas"]
        current = owner.get("status", {}).get("currentRevision", revision)
        current = revision if complete else current
        counts = {
            "readyReplicas": ready,
            "currentReplicas": sum(_revision(pod) == current for pod in here.values()),
            "updatedReplicas": updated,
        }
        status = {
            "observedGeneration": meta["generation"],
            "replicas": len(here),
            "availableReplicas": ready,
            "collisionCount": 0,
            "currentRevision": current,
            "updateRevision": revision,
        }
        store.put(deepcopy(owner) | {"status": status | {k: n for k, n in counts.items() if n}})

    def _adopt(self, owner: Object) -> None:
        """Own the pods that an earlier StatefulSet of this name has left."""
        labels = owner["spec"]["selector"].get("matchLabels", {}).items()
        for pod in self._store.select("Pod", owner["metadata"]["namespace"]):
            meta = pod["metadata"]
            parent = meta["name"].rpartition("-")[0]
            ours = parent == owner["metadata"]["name"] and labels <= meta.get("labels", {}).items()
            if ours and not meta.get("ownerReferences"):
                adopted = deepcopy(pod)
                adopted["metadata"]["ownerReferences"] = [_owner_reference(owner)]
                self._store.put(adopted)

    def _roll(self, owner: Object, here: dict[int, Object], revision: str) -> None:
        partition = owner["spec"]["updateStrategy"].get("rollingUpdate", {}).get("partition", 0)
        for ordinal in sorted(here, reverse=True):
            if ordinal >= partition and _revision(here[ordinal]) != revision:
                self._store.remove(here.pop(ordinal))
                replica = self._replica(owner, ordinal, revision)
                here |= {ordinal: replica} if replica else {}
            if ordinal not in here or not pods.is_ready(here[ordinal]):
                break

    def _replica(self, owner: Object, ordinal: int, revision: str) -> Object | None:
        store, spec, meta = self._store, owner["spec"], owner["metadata"]
        name = f"{meta['name']}-{ordinal}"
        templates = {c["metadata"]["name"]: c for c in spec.get("volumeClaimTemplates", [])}
        given = spec["template"]["spec"].get("volumes", [])
        volumes = [volume for volume in given if volume["name"] not in templates]
        for template_name, template in templates.items():
            claim = f"{template_name}-{name}"
            volumes.append({"name": template_name, "persistentVolumeClaim": {"claimName": claim}})
            if store.get("PersistentVolumeClaim", meta["namespace"], claim) is None:
                described = deepcopy(template["metadata"])
                labels = spec["selector"].get("matchLabels", {})
                described["labels"] = described.get("labels", {}) | labels
                if spec["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Delete":
                    described["ownerReferences"] = [_owner_reference(owner)]
                described["name"] = claim
                self._claim(
                    self._create(
                        *("PersistentVolumeClaim", meta["namespace"], claim, described),
                        spec=template["spec"],
                    )
                )
        labels = {
            "statefulset.kubernetes.io/pod-name": name,
            "apps.kubernetes.io/pod-index": str(ordinal),
            "controller-revision-hash": revision,
        }
        extra = {"hostname": name, "subdomain": spec.get("serviceName", ""), "volumes": volumes}
        return self._make_pod(owner, name, labels, extra)

    def _deployment(self, owner: Object) -> None:
        """A ReplicaSet per template; the old ones keep their pods until the new one's are ready."""
        spec, meta = owner["spec"], owner["metadata"]
        mark = {"pod-template-hash": _hash(spec["template"])}
        name = f"{meta['name']}-{mark['pod-template-hash']}"
        template, selector = deepcopy(spec["template"]), deepcopy(spec["selector"])
        for labelled, key in ((template["metadata"], "labels"), (selector, "matchLabels")):
            labelled[key] = labelled.get(key, {}) | mark
        wanted = {"replicas": spec["replicas"], "selector": selector, "template": template}
        current = self._store.get("ReplicaSet", meta["namespace"], name)
        if current is None:
            described = {"labels": template["metadata"]["labels"]}
            described["ownerReferences"] = [_owner_reference(owner)]
            current = self._create("ReplicaSet", meta["namespace"], name, described, spec=wanted)
        current = self._store.put(deepcopy(current) | {"spec": wanted})
        if self._replica_set(current) == spec["replicas"]:
            for old in self._store.owned(owner, "ReplicaSet"):
                if old["metadata"]["name"] != name:
                    emptied = deepcopy(old) | {"spec": old["spec"] | {"replicas": 0}}
                    self._replica_set(self._store.put(emptied))

    def _replica_set(self, owner: Object) -> int:
        """Create or remove pods; how many are ready."""
        count, meta = owner["spec"]["replicas"], owner["metadata"]
        here = self._store.owned(owner, "Pod")
        for pod in here[count:]:
            self._store.remove(pod)
        here = [self._run(pod) for pod in here[:count]]
        for number in range(len(here), count):
            suffix = _hash([meta["uid"], number, self._store.revision], 5)
            made = self._make_pod(owner, f"{meta['name']}-{suffix}", {}, {})
            here += [made] if made else []
        ready = sum(pods.is_ready(pod) for pod in here)
        status = {"replicas": len(here), "observedGeneration": meta["generation"]}
        status |= {"readyReplicas": ready, "availableReplicas": ready} if ready else {}
        self._store.put(deepcopy(owner) | {"status": status})
        return ready

    def _deployment_status(self, owner: Object) -> None:
        sets = self._store.owned(owner, "ReplicaSet")
        here = [pod for replica_set in sets for pod in self._store.owned(replica_set, "Pod")]
        ready = sum(pods.is_ready(pod) for pod in here)
        wanted, mark = owner["spec"]["replicas"], _hash(owner["spec"]["template"])
        updated = [p for p in here if p["metadata"]["labels"]["pod-template-hash"] == mark]
        counts = {
            "replicas": len(here),
            "updatedReplicas": len(updated),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "unavailableReplicas": max(wanted, len(here)) - ready,
        }
        good = ready >= wanted
        condition = {
            "type": "Available",
            "status": str(good),
            "reason": f"MinimumReplicas{'Available' if good else 'Unavailable'}",
            "message": f"Deployment {'has' if good else 'does not have'} minimum availability.",
        }
        status = {"observedGeneration": owner["metadata"]["generation"], "conditions": [condition]}
        status |= {name: n for name, n in counts.items() if n}
        self._store.put(deepcopy(owner) | {"status": status})

    def _job(self, owner: Object) -> None:
        """All the pods at once; the first attempt decides."""
        spec, meta = owner["spec"], owner["metadata"]
        done = {c["type"] for c in owner.get("status", {}).get("conditions", [])}
        if spec["suspend"] or done & {"Complete", "Failed"}:
            return
        here = [self._run(pod) for pod in self._store.owned(owner, "Pod")]
        for number in range(len(here), spec["completions"]):
            suffix = _hash([meta["uid"], number], 5)
            pod = self._make_pod(owner, f"{meta['name']}-{suffix}", {}, {"hostname": meta["name"]})
            here += [pod] if pod else []
        phases = [pod["status"]["phase"] for pod in here]
        counts = {
            "succeeded": phases.count("Succeeded"),
            "failed": phases.count("Failed"),
            "active": phases.count("Pending") + phases.count("Running"),
        }
        since = meta["creationTimestamp"]
        status: Object = {"startTime": since, "ready": 0, "terminating": 0}
        status |= {name: n for name, n in counts.items() if n}
        verdict = None
        if counts["failed"]:
            verdict = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
            types = ("FailureTarget", "Failed")
            self._event(owner, "Warning", *verdict, "job-controller")
        elif counts["succeeded"] == spec["completions"]:
            verdict = ("CompletionsReached", "Reached expected number of succeeded pods")
            types = ("SuccessCriteriaMet", "Complete")
            status["completionTime"] = since
            self._event(owner, "Normal", "Completed", "Job completed", "job-controller")
        if verdict:
            status["conditions"] = [_true(kind, since, *verdict) for kind in types]
        self._store.put(deepcopy(owner) | {"status": status})


def _true(kind: str, since: str, reason: str, message: str) -> Object:
    condition = {"type": kind, "status": "True", "lastTransitionTime": since}
    return condition | {"reason": reason, "message": message}


def _hash(value: Any, length: int = 10) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def _revision(pod: Object) -> str:
    revision: str = pod["metadata"]["labels"]["controller-revision-hash"]
    return revision


def _owner_reference(owner: Object) -> Object:
    named = {k: owner["metadata"][k] for k in ("name", "uid")}
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], **named}
    return reference | {"controller": True, "blockOwnerDeletion": True}
