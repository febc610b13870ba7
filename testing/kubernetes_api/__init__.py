"""A stand-in for the Kubernetes API, to try playbooks without a cluster.

It answers the kubernetes.core modules (k8s, k8s_info, k8s_log, k8s_cluster_info) and the Python
client as the API of one minikube node would, from memory. Each module is one concept:

    kinds.py         what is served, and the discovery documents
    schema.py        strict checking with the published schemas, merging of patches
    defaults.py      values filled in
    validation.py    values and changes refused
    pod_security.py  the Pod Security Standards
    store.py         the objects and selectors
    api.py           create, replace, patch, apply, delete
    pods.py          what a pod's status and events say
    controllers.py   pods, claims and status out of workloads
    server.py        HTTP, and the stand-in's own endpoints
    errors.py        refusals

What it is: as strict as the API is about a manifest and its changes, and stricter about unknown
fields, which it always refuses (as though every request said fieldValidation=Strict). A workload
gets ready only if what it mounts, claims and runs as is there and its pods are admitted; if not,
status and events say why in the API's words. Components can be kept from getting ready.

What it is not: no container runs, no image is looked at (so `runAsNonRoot` with an image that runs
as root is not noticed), no request reaches a Service, no NetworkPolicy, Role, PodDisruptionBudget
or HorizontalPodAutoscaler has an effect, and nobody is asked who they are. Time does not pass:
rollouts, growth and binding of claims and probes are over by the next read, nothing times out,
nothing is retried. Requests for CPU and memory are not counted, of quotas only `pods` is. Deletion
is at once: no grace period, no protection of claims in use. There is no watch, no exec, no scale,
status or eviction subresource, no CustomResourceDefinition, no OpenAPI, no JSON patch and no
protobuf (kubectl gets, describes, applies and deletes here, but cannot create), and lists come in
one piece. A playbook that passes here still has to pass on a cluster.
"""
