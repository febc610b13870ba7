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
from .pods import REASONS, containers
from .store import Store

Object = dict[str, Any]

VERSION = "1.34"  # of Kubernetes, as /version says

_PATH = re.compile(
    r"/(?:api|apis)/(?P<api_version>v1|[^/]+/[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?P<log>/log)?)?"
)


class Server:
    """A WSGI application; one request at a time."""

    def __init__(self) -> None:
        self._store = Store()
        self._controllers = Controllers(self._store)
        self._api = Api(self._store, self._controllers)
        self._logs: dict[str, str] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: Object, start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        path = environ["PATH_INFO"].rstrip("/")
        query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
        content_type = environ.get("CONTENT_TYPE", "").split(";")[0]
        method, code = environ["REQUEST_METHOD"], 200
        try:
            with self._lock:
                answer = self._answer(
                    method, path, query, _parsed(body, content_type), content_type
                )
            code = 201 if method == "POST" else 200
        except errors.ApiError as refusal:
            code, answer = refusal.code, refusal.status()
        except Exception:  # noqa: BLE001 - a fault of the stand-in has to reach the test that met it
            failure = errors.ApiError(500, "InternalError", traceback.format_exc())
            code, answer = 500, failure.status()
        text = isinstance(answer, str)
        sent = answer if text else json.dumps(answer) + "\n"
        headers = [("Content-Type", "text/plain" if text else "application/json")]
        start_response(f"{code} {HTTPStatus(code).phrase}", headers)
        return [sent.encode()]

    def _answer(
        self, method: str, path: str, query: dict[str, str], given: Object, content_type: str
    ) -> Any:
        """Return the object, or the text, that answers a request."""
        if path in {"/healthz", "/livez", "/readyz"}:
            return "ok"
        if path.startswith("/stand-in/"):
            return self._own(method, path.removeprefix("/stand-in/"), given)
        if path == "/version":
            major, minor = VERSION.split(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{VERSION}.0"} | dict.fromkeys(
                ("gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"), ""
            )
        if document := discovery(path):
            return document
        match = _PATH.fullmatch(path)
        kind = match and BY_PLURAL.get((match["api_version"], match["plural"]))
        if not match or not kind or "watch" in query:
            message = "the server could not find the requested resource"
            raise errors.ApiError(404, "NotFound", message)
        api, namespace, name = self._api, match["namespace"] or "", match["name"] or ""
        dry = "All" in {query.get("dryRun"), *given.get("dryRun", [])}
        if match["log"]:
            return self._log(api.read(kind, namespace, name), query)
        selectors = query.get("labelSelector", ""), query.get("fieldSelector", "")
        match method, bool(name):
            case "GET", True:
                obj = api.read(kind, namespace, name)
                if kind.kind == "Namespace":
                    self._controllers.finish(obj)
                return obj
            case "PATCH", True:
                return api.patch(kind, namespace, name, given, content_type, dry)
            case "DELETE", True:
                return api.delete(kind, namespace, name, dry)
            case "GET", False:
                return api.as_list(kind, api.select(kind, namespace, *selectors))
            case "POST", False:
                return api.create(kind, namespace, given, dry)
            case "DELETE", False:
                return api.delete_all(kind, api.select(kind, namespace, *selectors), dry)
        message = "the server does not allow this method on the requested resource"
        raise errors.ApiError(405, "MethodNotAllowed", message)

    def _own(self, method: str, name: str, given: Object) -> Any:
        if name == "objects":
            return self._submitted()
        if method == "PUT" and name == "logs":
            self._logs = given
        elif method == "PUT":
            if unknown := set(given.values()) - set(REASONS):
                known = ", ".join(REASONS)
                raise errors.bad_request(f"no such reason: {unknown.pop()}; there are {known}")
            self._controllers.never_ready = given
            self._controllers.reconcile()
        return self._logs if name == "logs" else self._controllers.never_ready

    def _submitted(self) -> list[Object]:
        """Return what clients created; what was applied is shown as the manifest it came from."""
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
        meta = pod["metadata"]
        name = query.get("container", pod["spec"]["containers"][0]["name"])
        if name not in [c["name"] for c in containers(pod)]:
            raise errors.bad_request(f"container {name} is not valid for pod {meta['name']}")
        owners = [ref["name"] for ref in meta.get("ownerReferences", [])]
        places = [f"{who}{at}" for at in (f"/{name}", "") for who in (meta["name"], *owners)]
        text = next((self._logs[p] for p in places if p in self._logs), f"{name} started\n")
        lines = text.splitlines(keepends=True)
        return "".join(lines[-int(query.get("tailLines", len(lines) or 1)) :])


def _parsed(body: bytes, content_type: str) -> Object:
    """A body is one JSON object; YAML only where its type says so."""
    try:
        given = yaml.safe_load(body) if content_type.endswith("yaml") else json.loads(body or "{}")
    except (ValueError, yaml.YAMLError) as error:
        raise errors.bad_request(f"the body of the request is malformed: {error}") from error
    if not isinstance(given, dict):
        raise errors.bad_request("the body of the request is not an object")
    return given
