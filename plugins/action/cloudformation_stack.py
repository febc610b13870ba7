"""``iot.platform.cloudformation_stack``: amazon.aws.cloudformation that shows the stack's events.

It takes the options of amazon.aws.cloudformation (``region`` is required here) and these:

``state: settled``
    Change nothing. Wait until no operation is in progress and return what the stack is then.
``protected``
    Protect the stack from being deleted, once it is complete. ``state: absent`` takes it off first.
``poll_seconds``
    Seconds between two looks at the stack's events, 5 by default.

It returns what amazon.aws.cloudformation returns, and

``status``
    The stack's status, for example ``UPDATE_COMPLETE``; ``null`` where there is no stack.
``alive``
    Whether it can be updated. Any other stack has to be deleted before its name is free again.
``is_protected``
    Whether it is protected from being deleted.
``outputs``, ``parameters``
    The stack's outputs and parameters, mappings.
``changes``
    In check mode, one entry for each resource that would change: ``action``, ``type``, ``id``
    (logical), ``properties`` (names) and ``replacement`` (``True``, ``False`` or ``Conditional``,
    as in a change set).
``would_change``
    In check mode, whether there is a change; one of tags or outputs is in no resource.

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
except ImportError:  # pragma: no cover - the role's preflight says so first
    boto3 = None

Json = dict[str, Any]

# An operation is in progress; a stack in review has no operation, only a change set that nobody has
# executed.
IN_PROGRESS = re.compile(r"(?<!REVIEW)_IN_PROGRESS$")
# A stack that was never finished, or not completely deleted.
DEAD = {
    *("CREATE_FAILED", "ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "DELETE_FAILED"),
    *("REVIEW_IN_PROGRESS", "IMPORT_ROLLBACK_FAILED"),
}
# Reasons that only follow from the failure of another resource.
CONSEQUENCE = re.compile(r"(?i)creation cancelled|update cancelled|following resource\(s\) failed")
# What AWS and the SDK say about credentials that are missing, wrong or no longer valid.
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
    """What happens to one stack, from now on, as lines for a person.

    ``show`` is called with each line. Resources that are done or failed are named when that
    happens, and those that are still being worked on once a minute.
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
        # What happened before is not shown; to find it by its time would need AWS's clock.
        self._newest = ""
        self._new_events()

    def look(self) -> None:
        """Show what is new. A stack that is not there (yet) is nothing new."""
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
            return  # the stack itself: its end is the result of the task
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
    """Runs the module while a thread shows what the stack does."""

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
        # The module says nothing while it waits, so a thread does. What the thread cannot read is
        # not worth stopping for: the module meets the same error.
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
        # The module takes any error for the end of a deletion, an expired token included: ask
        # again.
        described = describe(client, stack)
        if arguments.get("state") == "absent" and described["status"] and not result.get("failed"):
            result |= {"failed": True, "output": f"the stack is {described['status']}"}
        if result.get("failed"):
            # Nothing else of the module's result: with some of it, Ansible prints that instead.
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
            meta = result.pop("meta", None)  # a text where nothing would change
            changes = [change_of(entry) for entry in meta] if isinstance(meta, list) else []
        else:
            result = {"changed": True}
            changes = additions(arguments["template_body"])
        if result.get("failed"):
            return result
        for change in changes:
            progress.show(line_of(change))
        # Beside `changed`, which a task overrides that only wants to know.
        would = {"changes": changes, "would_change": bool(result.get("changed"))}
        return {**result, **described, **would}


def watch(progress: Progress, done: threading.Event, poll: float) -> None:
    """Show events until ``done``, and those of the last moment."""
    last = False
    while not last:
        last = done.wait(poll)
        try:
            progress.look()
        except (BotoCoreError, ClientError):
            continue


def settle(client: Any, stack: str, progress: Progress, poll: float) -> Json:
    """Wait until no operation is in progress; return what `describe` says then."""
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
    """Turn the protection of a stack on or off; return whether it was otherwise."""
    if describe(client, stack)["is_protected"] == wanted:
        return False
    client.update_termination_protection(StackName=stack, EnableTerminationProtection=wanted)
    return True


def describe(client: Any, stack: str) -> Json:
    """What the stack is, in the words of this module's documentation."""
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
    """What went wrong, by the first resource that failed: the module says "Unknown error"."""
    said = str(result.get("msg") or "")
    # Newest first. Without a watcher that saw the events (they were too quick) this is what there
    # is.
    logged = [line for line in reversed(result.get("log") or []) if not CONSEQUENCE.search(line)]
    causes = failures or logged or ([said] if said and said != "Unknown error" else [])
    cause = causes[0] if causes else "CloudFormation gives no reason"
    outcome = (result.get("output") or "failed").rstrip(".")
    return f"{stack}: {outcome}. First cause: {cause}"


def change_of(entry: Json) -> Json:
    """A change of a change set, as this plugin returns it."""
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
    """A change as a line for a person."""
    replaced = {"True": ": REPLACED", "Conditional": ": may be REPLACED"}
    names = f" ({', '.join(change['properties'])})" if change["properties"] else ""
    return (
        f"  would {change['action']:<7} {change['type']} {change['id']}{names}"
        f"{replaced.get(change['replacement'], '')}"
    )


class TemplateLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types here
    """Reads a template without minding CloudFormation's tags (``!Ref`` and the like)."""


TemplateLoader.add_multi_constructor("!", lambda _loader, _suffix, _node: None)


def additions(template: str) -> list[Json]:
    """Every resource of a template, as changes: what a new stack would create."""
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
