"""``iot.platform.cloudformation_stack``: amazon.aws.cloudformation that shows a stack's events.

It takes the options of amazon.aws.cloudformation (``region`` is required here) and these:

``state: settled``
    Change nothing. Wait until no operation is in progress and return the state of the stack.
``protected``
    Turn on termination protection when the stack is complete. ``state: absent`` turns it off first.
``poll_seconds``
    Seconds between two checks of the stack's events, 5 by default.

It returns the results of amazon.aws.cloudformation, and

``status``
    The stack's status, for example ``UPDATE_COMPLETE``; ``null`` if there is no stack.
``alive``
    Whether the stack can be updated. If not, it has to be deleted before it can be created again.
``is_protected``
    Whether termination protection is on.
``outputs``, ``parameters``
    The stack's outputs and parameters, as mappings.
``changes``
    In check mode, one entry for each resource that would change: ``action``, ``type``, ``id``
    (logical), ``properties`` (names) and ``replacement`` (``True``, ``False`` or ``Conditional``,
    as in a change set).
``would_change``
    In check mode, whether there is a change. A change of tags or outputs is not in ``changes``.

Credentials and endpoint come from the environment of ansible-playbook, as boto3 reads them.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import yaml
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

try:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError:  # pragma: no cover - the role's preflight reports it first
    boto3 = None

Json = dict[str, Any]

# An operation is in progress. In REVIEW_IN_PROGRESS there is none: the stack has only a change set
# that was not executed.
IN_PROGRESS = re.compile(r"(?<!REVIEW)_IN_PROGRESS$")
# The stack was not created or not deleted completely.
DEAD = {
    *("CREATE_FAILED", "ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "DELETE_FAILED"),
    *("REVIEW_IN_PROGRESS", "IMPORT_ROLLBACK_FAILED"),
}
# Reasons that only follow from the failure of another resource.
CONSEQUENCE = re.compile(r"(?i)creation cancelled|update cancelled|following resource\(s\) failed")
# Error texts of AWS and the SDK for credentials that are missing, wrong or no longer valid.
CREDENTIALS = re.compile(
    r"ExpiredToken|RequestExpired|InvalidClientTokenId|UnrecognizedClientException|AuthFailure"
    r"|Unable to locate credentials|Token has expired|SSO session|Error loading SSO Token"
)
LOG_IN = (
    "The AWS credentials are missing or no longer valid. Log in again (for example with `aws sso "
    "login`), check with `aws sts get-caller-identity`, and run the playbook again: it continues "
    "where it stopped."
)


class Progress:
    """Shows the events of one stack, from now on, as lines of text.

    ``show`` is called with each line. A resource is shown when it is complete or has failed;
    resources in progress are listed once a minute.
    """

    def __init__(
        self,
        client: Any,
        stack: str,
        show: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.client, self.stack, self.show, self.clock = client, stack, show, clock
        self.started = self.shown = clock()
        self.stack_id = ""
        self.failures: list[str] = []
        self._under_way: dict[str, str] = {}
        # Skip earlier events. They are found by their ID: their times are those of AWS's clock.
        self._newest = ""
        self._new_events()

    def look(self) -> None:
        """Show new events. A stack that does not exist (yet) has none."""
        for event in reversed(self._new_events()):
            self._take(event)
        if self.clock() - self.shown >= 60:
            names = ", ".join(self._under_way.values())
            self._line("IN_PROGRESS", names or "nothing new from CloudFormation")

    def _new_events(self) -> list[Json]:
        """Events since the last call, newest first."""
        found: list[Json] = []
        pages = self.client.get_paginator("describe_stack_events")
        try:
            for page in pages.paginate(StackName=self.stack_id or self.stack):
                for event in page["StackEvents"]:
                    if event["EventId"] == self._newest:
                        return self._remembered(found)
                    found.append(event)
        except ClientError as error:
            if "does not exist" not in str(error):
                raise
        return self._remembered(found)

    def _remembered(self, found: list[Json]) -> list[Json]:
        if found:
            self._newest = found[0]["EventId"]
        return found

    def _take(self, event: Json) -> None:
        self.stack_id = event["StackId"]
        status, reason = event["ResourceStatus"], event.get("ResourceStatusReason", "")
        name = f"{event['ResourceType']} {event['LogicalResourceId']}"
        if event.get("PhysicalResourceId") == event["StackId"]:
            return  # the stack itself: the result of the task shows its end
        if status.endswith("_IN_PROGRESS"):
            self._under_way[name] = name
            return
        self._under_way.pop(name, None)
        if status.endswith("_FAILED"):
            if not CONSEQUENCE.search(reason):
                self.failures.append(f"{name}: {reason}")
            name = f"{name}: {reason}"
        self._line(status, name)

    def _line(self, status: str, text: str) -> None:
        self.shown = self.clock()
        self.show(f"  {self.shown - self.started:5.0f} s  {status:<16} {text}")


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible has no types
    """Runs the module while a thread shows the stack's events."""

    def run(self, tmp: str | None = None, task_vars: Json | None = None) -> Json:
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        poll = float(arguments.pop("poll_seconds", 5))
        protected = boolean(arguments.pop("protected", False))
        for name in ("stack_name", "region"):
            if not arguments.get(name):
                return {
                    "failed": True,
                    "msg": f"cloudformation_stack: the option {name} is required",
                }
        if boto3 is None:
            return {
                "failed": True,
                "msg": "boto3 is not installed where ansible-playbook runs: pip install boto3",
            }
        stack = arguments["stack_name"]
        try:
            client = boto3.client("cloudformation", region_name=arguments["region"])
            progress = Progress(client, stack, Display().display)
            if arguments.get("state") == "absent" and not self._task.check_mode:
                protect(client, stack, wanted=False)
            result = self._run(client, progress, arguments, poll, task_vars)
            done = arguments.get("state") == "present" and not result.get("failed")
            if done and not self._task.check_mode and protect(client, stack, wanted=protected):
                result |= {"changed": True, "is_protected": protected}
        except (BotoCoreError, ClientError) as error:
            result = {"failed": True, "msg": f"{stack}: {error}"}
        if result.get("failed") and CREDENTIALS.search(
            f"{result.get('msg')} {result.get('output')}"
        ):
            result["msg"] = f"{result['msg']}\n{LOG_IN}"
        return result

    def _run(
        self, client: Any, progress: Progress, arguments: Json, poll: float, task_vars: Json | None
    ) -> Json:
        stack = arguments["stack_name"]
        if arguments.get("state") == "settled":
            return {"changed": False, **settle(client, stack, progress, poll)}
        if self._task.check_mode:
            return self._check(client, progress, arguments, task_vars)
        # The module shows nothing while it waits, so a thread shows the events. Errors in the
        # thread are ignored: the module gets the same errors.
        done = threading.Event()
        thread = threading.Thread(target=watch, args=(progress, done, poll), daemon=True)
        thread.start()
        try:
            result: Json = self._execute_module(
                "amazon.aws.cloudformation", module_args=arguments, task_vars=task_vars
            )
        finally:
            done.set()
            thread.join(30)
        # While it deletes a stack, the module takes any error for success, even an expired token:
        # check the status.
        described = describe(client, stack)
        if arguments.get("state") == "absent" and described["status"] and not result.get("failed"):
            result |= {"failed": True, "output": f"the stack is {described['status']}"}
        if result.get("failed"):
            # Without the rest of the module's result: Ansible would print some of it instead.
            message = explain(stack, result, progress.failures)
            return {"failed": True, "msg": message, "status": described["status"]}
        return {**result, **described}

    def _check(
        self, client: Any, progress: Progress, arguments: Json, task_vars: Json | None
    ) -> Json:
        described = describe(client, arguments["stack_name"])
        if arguments.get("state") == "absent":
            return {"changed": bool(described["status"]), **described}
        if described["alive"]:
            result: Json = self._execute_module(
                "amazon.aws.cloudformation", module_args=arguments, task_vars=task_vars
            )
            meta = result.pop("meta", None)  # a string if nothing would change
            changes = [change_of(entry) for entry in meta] if isinstance(meta, list) else []
        else:
            result = {"changed": True}
            changes = additions(arguments["template_body"])
        if result.get("failed"):
            return result
        for change in changes:
            progress.show(line_of(change))
        # `would_change` repeats `changed`, because a task may override `changed`.
        would = {"changes": changes, "would_change": bool(result.get("changed"))}
        return {**result, **described, **would}


def watch(progress: Progress, done: threading.Event, poll: float) -> None:
    """Show events until ``done`` is set, and once more after that."""
    last = False
    while not last:
        last = done.wait(poll)
        try:
            progress.look()
        except (BotoCoreError, ClientError):
            continue


def settle(client: Any, stack: str, progress: Progress, poll: float) -> Json:
    """Wait until no operation is in progress; return the result of `describe`."""
    described = describe(client, stack)
    if not IN_PROGRESS.search(described["status"] or ""):
        return described
    progress.show(
        f"  {stack} is {described['status']}: waiting for an operation that was started earlier"
    )
    while IN_PROGRESS.search(described["status"] or ""):
        time.sleep(poll)
        progress.look()
        described = describe(client, stack)
    return described


def protect(client: Any, stack: str, *, wanted: bool) -> bool:
    """Turn termination protection on or off; return whether that changed it."""
    if describe(client, stack)["is_protected"] == wanted:
        return False
    client.update_termination_protection(StackName=stack, EnableTerminationProtection=wanted)
    return True


def describe(client: Any, stack: str) -> Json:
    """Return the state of the stack, with the keys that the module's docstring lists."""
    try:
        (found,) = client.describe_stacks(StackName=stack)["Stacks"]
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        nothing: Json = {"status": None, "alive": False, "outputs": {}, "parameters": {}}
        return nothing | {"reason": "", "is_protected": False}
    status = found["StackStatus"]
    return {
        "status": status,
        "alive": status not in DEAD,
        "outputs": {one["OutputKey"]: one["OutputValue"] for one in found.get("Outputs", [])},
        "parameters": {
            one["ParameterKey"]: one["ParameterValue"] for one in found.get("Parameters", [])
        },
        "reason": found.get("StackStatusReason", ""),
        "is_protected": bool(found.get("EnableTerminationProtection")),
    }


def explain(stack: str, result: Json, failures: list[str]) -> str:
    """Return an error message with the first failure: the module only says "Unknown error"."""
    said = str(result.get("msg") or "")
    # Newest first. Used if the thread saw no failure because the operation was too short.
    logged = [line for line in reversed(result.get("log") or []) if not CONSEQUENCE.search(line)]
    causes = failures or logged or ([said] if said and said != "Unknown error" else [])
    cause = causes[0] if causes else "CloudFormation gives no reason"
    outcome = (result.get("output") or "failed").rstrip(".")
    return f"{stack}: {outcome}. First cause: {cause}"


def change_of(entry: Json) -> Json:
    """A change of a change set, in the format that this plugin returns."""
    change = entry["ResourceChange"]
    targets = [detail.get("Target", {}) for detail in change.get("Details", [])]
    names = {target.get("Name") or target.get("Attribute") for target in targets}
    return {
        "action": change["Action"],
        "type": change["ResourceType"],
        "id": change["LogicalResourceId"],
        "properties": sorted(name for name in names if name),
        "replacement": change.get("Replacement", "False"),
    }


def line_of(change: Json) -> str:
    """A change as a line of text."""
    replaced = {"True": ": REPLACED", "Conditional": ": may be REPLACED"}
    names = f" ({', '.join(change['properties'])})" if change["properties"] else ""
    return (
        f"  would {change['action']:<7} {change['type']} {change['id']}{names}"
        f"{replaced.get(change['replacement'], '')}"
    )


class TemplateLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types here
    """Reads a template and ignores CloudFormation's tags (``!Ref`` and others)."""


TemplateLoader.add_multi_constructor("!", lambda _loader, _suffix, _node: None)


def additions(template: str) -> list[Json]:
    """Every resource of a template as a change: a new stack would create them."""
    resources = yaml.load(template, TemplateLoader)["Resources"]  # noqa: S506 - a SafeLoader
    return [
        {
            "action": "Add",
            "type": resource["Type"],
            "id": name,
            "properties": [f"if {resource['Condition']}"] if "Condition" in resource else [],
            "replacement": "False",
        }
        for name, resource in resources.items()
    ]
