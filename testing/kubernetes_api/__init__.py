"""A stand-in for the Kubernetes API, to run playbooks without a cluster.

It answers the kubernetes.core modules (k8s, k8s_info, k8s_log, k8s_cluster_info), the Python client
and part of kubectl, from memory:

    kinds.py        the kinds that are served, and discovery
    store.py        the objects, selectors, garbage collection
    merge.py        merge patch
    api.py          create, patch, delete; dry runs
    controllers.py  pods, claims and status of StatefulSets and Jobs; deletion of namespaces
    pods.py         status and events of a pod
    server.py       HTTP, and the stand-in's own endpoints
    errors.py       refusals

A workload becomes ready only if the Secrets, ConfigMaps, claims and the service account that its
pods refer to exist; if not, status and events say why, as in a cluster. A test can keep components
from becoming ready.

What it does not do: it runs no container, checks no manifest (kubernetes-validate and checkov do),
enforces no PodSecurity level, quota, NetworkPolicy or access right, and fills in only the defaults
that its controllers or the roles read. Time does not pass: rollouts and binding of claims are done
by the next request. There is no replace, server-side apply, strategic merge patch or JSON patch,
which the roles do not use; no watch, exec or scale; no CustomResourceDefinition, OpenAPI or
protobuf.
"""
