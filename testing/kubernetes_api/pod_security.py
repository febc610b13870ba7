"""The Pod Security Standards `baseline` and `restricted`, in the words of the admission plugin.

Written after https://kubernetes.io/docs/concepts/security/pod-security-standards/ (the rules) and
https://kubernetes.io/docs/concepts/security/pod-security-admission/ (the labels). Linux pods only.
Of `baseline`, the rules on added capabilities, SELinux, AppArmor, seccomp, procMount, sysctls, the
host field of probes and Windows are left out; `restricted` has its own on the first and the fourth.
"""

from collections.abc import Callable, Iterator
from typing import Any

Object = dict[str, Any]

LABEL = "pod-security.kubernetes.io/"
LEVELS = ("privileged", "baseline", "restricted")

_ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def _containers(spec: Object) -> list[Object]:
    names = ("initContainers", "containers", "ephemeralContainers")
    return [container for name in names for container in spec.get(name, [])]


def _named(what: str, names: list[str], verb: str = "") -> str:
    """`containers "a", "b"`, or with a verb `container "a" uses`."""
    listed = ", ".join(f'"{name}"' for name in names)
    several = len(names) > 1
    verb = f" {verb}{'' if several else 's'}" if verb else ""
    return f"{what}{'s' * several} {listed}{verb}"


def _where(spec: Object, wrong: Callable[[Object], bool]) -> str:
    """The containers whose security context is wrong: `containers "a", "b"`, or ""."""
    bad = [c["name"] for c in _containers(spec) if wrong(c.get("securityContext", {}))]
    return _named("container", bad) if bad else ""


def _inherited(spec: Object, field: str, good: Callable[[Any], bool], must: str, never: str) -> str:
    """What is wrong with a setting that containers inherit from their pod; "" when nothing is."""
    pod = spec.get("securityContext", {}).get(field)
    explicit = ["pod"] if pod is not None and not good(pod) else []
    explicit += [_where(spec, lambda c: field in c and not good(c[field]))]
    if any(explicit):
        return f"{' and '.join(filter(None, explicit))} must not set securityContext.{never}"
    where = _where(spec, lambda c: field not in c) if pod is None else ""
    return f"pod or {where} must set securityContext.{must}" if where else ""


def _baseline(spec: Object) -> Iterator[str]:
    if used := [f"{n}=true" for n in ("hostNetwork", "hostPID", "hostIPC") if spec.get(n)]:
        yield f"host namespaces ({', '.join(used)})"
    ports = {
        c["name"]: [str(p["hostPort"]) for p in c.get("ports", []) if p.get("hostPort")]
        for c in _containers(spec)
    }
    if names := [name for name in ports if ports[name]]:
        used = sorted({port for name in names for port in ports[name]})
        several = "s" * (len(used) > 1)
        yield f"hostPort ({_named('container', names, 'use')} hostPort{several} {', '.join(used)})"
    if where := _where(spec, lambda c: c.get("privileged", False)):
        yield f"privileged ({where} must not set securityContext.privileged=true)"


def _seccomp(spec: Object) -> str:
    return _inherited(
        *(spec, "seccompProfile", lambda p: p.get("type") in {"RuntimeDefault", "Localhost"}),
        must='seccompProfile.type to "RuntimeDefault" or "Localhost"',
        never='seccompProfile.type to "Unconfined"',
    )


def _host_paths(spec: Object) -> Iterator[str]:
    if names := [v["name"] for v in spec.get("volumes", []) if "hostPath" in v]:
        yield f"hostPath volumes ({_named('volume', names)})"


def _restricted(spec: Object) -> Iterator[str]:
    if where := _where(spec, lambda c: c.get("allowPrivilegeEscalation") is not False):
        yield (
            f"allowPrivilegeEscalation != false ({where} must set "
            "securityContext.allowPrivilegeEscalation=false)"
        )
    faults = []
    if where := _where(spec, lambda c: "ALL" not in c.get("capabilities", {}).get("drop", [])):
        faults.append(f'{where} must set securityContext.capabilities.drop=["ALL"]')
    capabilities = [c.get("securityContext", {}).get("capabilities", {}) for c in _containers(spec)]
    added = {name for c in capabilities for name in c.get("add", [])} - {"NET_BIND_SERVICE"}
    if added:
        where = _where(spec, lambda c: bool(added & set(c.get("capabilities", {}).get("add", []))))
        listed = ", ".join(f'"{a}"' for a in sorted(added))
        faults.append(f"{where} must not include {listed} in securityContext.capabilities.add")
    if faults:
        yield f"unrestricted capabilities ({'; '.join(faults)})"
    types = {
        v["name"]: kind
        for v in spec.get("volumes", [])
        for kind in v
        if kind != "name" and kind not in _ALLOWED_VOLUMES
    }
    if types:
        users = _named("volume", list(types), "use")
        yield (
            f"restricted volume types ({users} restricted volume "
            f"{_named('type', sorted(set(types.values())))})"
        )
    if wrong := _inherited(spec, "runAsNonRoot", bool, "runAsNonRoot=true", "runAsNonRoot=false"):
        yield f"runAsNonRoot != true ({wrong})"
    roots = [_where(spec, lambda c: c.get("runAsUser") == 0)]
    roots += ["pod"] if spec.get("securityContext", {}).get("runAsUser") == 0 else []
    if roots := [r for r in reversed(roots) if r]:
        yield f"runAsUser=0 ({' and '.join(roots)} must not set runAsUser=0)"
    if wrong := _seccomp(spec):
        yield f"seccompProfile ({wrong})"


def violation(namespace: Object, mode: str, spec: Object) -> str:
    """What a pod breaks of the level that the namespace asks for in `mode` (enforce, warn).

    The text is `violates PodSecurity "restricted:latest": …`, or "" when nothing is broken.
    """
    labels = namespace["metadata"].get("labels", {})
    level = labels.get(f"{LABEL}{mode}", "privileged")
    version = labels.get(f"{LABEL}{mode}-version", "latest")
    broken: list[str] = []
    if level != "privileged":
        broken += _baseline(spec)
    if level == "baseline":
        broken += _host_paths(spec)
    if level == "restricted":
        broken += _restricted(spec)
    return f'violates PodSecurity "{level}:{version}": {", ".join(broken)}' if broken else ""
