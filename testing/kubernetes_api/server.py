"""HTTP: paths to operations, refusals to Status objects, and the stand-in's own endpoints.

    GET      /stand-in/objects      what clients created and is still there, as they submitted it
    GET|PUT  /stand-in/never-ready  {"collector": "ImagePullBackOff", "postgres/initdb": "Error"}
    GET|PUT  /stand-in/logs         {"collector": "the text", "postgres/initdb": "another"}

Names are those of workloads, pods, or either with a container. A PUT replaces the whole map, and
takes effect before it is answered.
"""

import json
import re
import threading
import traceback
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

import yaml

from . import errors
from .api import LAST_APPLIED, Api
from .controllers import Controllers
from .kinds import BY_PLURAL, discovery
from .pods import REASONS, images
from .schema import Schemas
from .store import Store

Object = dict[str, Any]
Answer = tuple[int, Any, list[str]]  # status code, JSON object or text, warnings

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?"
)


class Server:
    """A WSGI application; one request at a time."""

    def __init__(self, version: str) -> None:
        self._schemas = Schemas(version)
        self._store = Store()
        self._controllers = Controllers(self._store)
        self._controllers.set_up()
        self._api = Api(self._schemas, self._store, self._controllers)
        self._logs: dict[str, str] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: Object, start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        path = environ["PATH_INFO"].rstrip("/")
        query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
        content_type = environ.get("CONTENT_TYPE", "").split(";")[0]
        method = environ["REQUEST_METHOD"]
        try:
            with self._lock:
                code, answer, warnings = self._answer(method, path, query, body, content_type)
        except errors.ApiError as refusal:
            code, answer, warnings = refusal.code, refusal.status(), []
        except Exception:  # noqa: BLE001 - a fault of the stand-in has to reach the test that met it
            failure = errors.ApiError(500, "InternalError", traceback.format_exc())
            code, answer, warnings = 500, failure.status(), []
        text = isinstance(answer, str)
        sent = answer if text else json.dumps(answer, separators=(",", ":")) + "\n"
        headers = [("Content-Type", "text/plain" if text else "application/json")]
        headers += [("Warning", f"299 - {json.dumps(warning)}") for warning in warnings]
        start_response(f"{code} {HTTPStatus(code).phrase}", headers)
        return [sent.encode()]

    def _answer(
        self, method: str, path: str, query: dict[str, str], body: bytes, content_type: str
    ) -> Answer:
        if path in {"/healthz", "/livez", "/readyz"}:
            return 200, "ok", []
        if path.startswith("/stand-in/"):
            return self._own(method, path.removeprefix("/stand-in/"), body)
        if path == "/version":
            return 200, self._version(), []
        if document := discovery(path):
            return 200, document, []
        match = _PATH.fullmatch(path)
        kind = match and BY_PLURAL.get(
            (match["group"] or "", match["core"] or match["version"], match["plural"])
        )
        if not match or not kind or (match["namespace"] and not kind.namespaced):
            raise errors.ApiError(
                *(404, "NotFound"), "the server could not find the requested resource"
            )
        api, namespace, name = self._api, match["namespace"] or "", match["name"] or ""
        dry = query.get("dryRun") == "All"
        if match["subresource"]:
            if (method, match["subresource"], kind.kind) == ("GET", "log", "Pod"):
                return 200, self._log(api.read(kind, namespace, name), query), []
            raise errors.ApiError(
                *(404, "NotFound"), f"the stand-in has no {path.rsplit('/', 1)[-1]}"
            )
        if query.get("watch") in {"true", "1", "True"}:
            raise errors.bad_request("the stand-in has no watch")
        given = _parsed(body, content_type)
        if name:
            match method:
                case "GET":
                    obj = api.read(kind, namespace, name)
                    if kind.kind == "Namespace":
                        self._controllers.finish(obj)
                    return 200, obj, []
                case "PUT":
                    obj = api.replace(kind, namespace, name, given, dry)
                    return 200, obj, api.warnings(kind, obj)
                case "PATCH" if content_type == "application/apply-patch+yaml":
                    manager = query.get("fieldManager", "")
                    obj = api.apply(kind, namespace, name, given, manager, dry)
                    return 200, obj, api.warnings(kind, obj)
                case "PATCH":
                    obj = api.patch(kind, namespace, name, given, content_type, dry)
                    return 200, obj, api.warnings(kind, obj)
                case "DELETE":
                    dry = dry or given.get("dryRun") == ["All"]
                    policy = given.get("propagationPolicy", query.get("propagationPolicy"))
                    return 200, api.delete(kind, namespace, name, dry, policy == "Orphan"), []
        selectors = query.get("labelSelector", ""), query.get("fieldSelector", "")
        if method == "GET":
            items = api.select(kind, namespace, *selectors)
            return 200, api.as_list(kind, items), []
        if method == "POST" and not name and bool(namespace) == kind.namespaced:
            obj = api.create(kind, namespace, given, dry)
            return 201, obj, api.warnings(kind, obj)
        if method == "DELETE" and not name:
            items = api.select(kind, namespace, *selectors)
            return 200, api.delete_all(kind, items, dry), []
        raise errors.ApiError(
            *(405, "MethodNotAllowed"),
            "the server does not allow this method on the requested resource",
        )

    def _version(self) -> Object:
        version = self._schemas.version
        major, minor, _ = version.split(".")
        unknown = ("gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler")
        told = {"major": major, "minor": minor, "gitVersion": f"v{version}", "platform": "linux"}
        return told | dict.fromkeys(unknown, "")

    def _own(self, method: str, name: str, body: bytes) -> Answer:
        if (method, name) == ("GET", "objects"):
            return 200, self._submitted(), []
        if name not in {"never-ready", "logs"} or method not in {"GET", "PUT"}:
            raise errors.ApiError(404, "NotFound", f"the stand-in has no {method} {name}")
        if method == "PUT":
            self.configure(**{name.replace("-", "_"): json.loads(body)})
        return 200, self._controllers.never_ready if name == "never-ready" else self._logs, []

    def configure(
        self, never_ready: dict[str, str] | None = None, logs: dict[str, str] | None = None
    ) -> None:
        """Replace what is told about components. ApiError on a reason that is none."""
        if never_ready is not None:
            if unknown := set(never_ready.values()) - set(REASONS):
                known = ", ".join(REASONS)
                raise errors.bad_request(f"no such reason: {unknown.pop()}; there are {known}")
            self._controllers.never_ready = never_ready
        self._logs = self._logs if logs is None else logs
        self._controllers.reconcile()

    def _submitted(self) -> list[Object]:
        """An object that was applied by a client is shown as the manifest it came from."""
        shown = []
        for obj in self._store.select():
            meta = obj["metadata"]
            if meta["uid"] not in self._store.by_client:
                continue
            if applied := meta.get("annotations", {}).get(LAST_APPLIED):
                shown.append(json.loads(applied))
                continue
            kept = ("name", "namespace", "labels", "annotations", "finalizers", "ownerReferences")
            rest = {k: v for k, v in obj.items() if k != "status"}
            shown.append(rest | {"metadata": {k: meta[k] for k in kept if k in meta}})
        return shown

    def _log(self, pod: Object, query: dict[str, str]) -> str:
        meta, name = pod["metadata"], query.get("container", "")
        spec, status = pod["spec"], pod.get("status", {})
        mains = [c["name"] for c in spec["containers"]]
        if not name and len(mains) > 1:
            raise errors.bad_request(
                f"a container name must be specified for pod {meta['name']}, choose one of: "
                f"[{' '.join(mains)}]"
            )
        name = name or mains[0]
        if name not in [c["name"] for c in images(spec)]:
            raise errors.bad_request(f"container {name} is not valid for pod {meta['name']}")
        lists = (status.get(f, []) for f in ("initContainerStatuses", "containerStatuses"))
        known: Object = next((s for found in lists for s in found if s["name"] == name), {})
        waiting = known.get("state", {"waiting": {}}).get("waiting")
        if query.get("previous") in {"true", "True", "1"} and "lastState" not in known:
            raise errors.bad_request(
                f'previous terminated container "{name}" in pod "{meta["name"]}" not found'
            )
        if waiting is not None and "lastState" not in known:
            raise errors.bad_request(
                f'container "{name}" in pod "{meta["name"]}" is waiting to start: '
                f"{_WAITING.get(waiting.get('reason', ''), waiting.get('reason', ''))}"
            )
        owners = [ref["name"] for ref in meta.get("ownerReferences", [])]
        places = [f"{who}{at}" for at in (f"/{name}", "") for who in (meta["name"], *owners)]
        text = next((self._logs[p] for p in places if p in self._logs), f"{name} started\n")
        lines = text.splitlines(keepends=True)
        return "".join(lines[-int(query.get("tailLines", len(lines))) :] if lines else [])


_WAITING = {
    "ImagePullBackOff": "trying and failing to pull image",
    "ErrImageNeverPull": "image is not present with pull policy of Never",
}


def _parsed(body: bytes, content_type: str) -> Object:
    """A body is one JSON object; YAML only where its type says so."""
    if not body:
        return {}
    if "protobuf" in content_type:  # which kubectl sends to create an object
        raise errors.ApiError(415, "UnsupportedMediaType", "the stand-in has no protobuf")
    try:
        given = yaml.safe_load(body) if content_type.endswith("yaml") else json.loads(body)
    except (ValueError, yaml.YAMLError) as error:
        raise errors.bad_request(f"the body of the request is malformed: {error}") from error
    if not isinstance(given, dict):
        raise errors.bad_request("the body of the request is not an object")
    return given
