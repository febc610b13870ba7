"""The image of the collector is built and pushed once for each state of its sources.

A stand-in for the container engine records its arguments. tests/test_image.py builds the Dockerfile
with a real engine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from deployments import Deployment

from testing.aws.emulator import Emulator

pytestmark = pytest.mark.timeout(900)

ENGINE = r"""#!/bin/sh
echo "$@" >> "{folder}/asked"
case $1 in
  login) cat > "{folder}/password"; echo "$REGISTRY_AUTH_FILE" > "{folder}/auth"
         touch "$REGISTRY_AUTH_FILE" ;;
  push) exec aws --region=eu-west-1 ecr put-image --repository-name=iot-system/collector \
          "--image-tag=${{2##*:}}" "--image-manifest={{\"tag\": \"${{2##*:}}\"}}" ;;
esac
"""


def test_image_is_built_and_pushed_once(account: Emulator, tmp_path: Path) -> None:
    engine = tmp_path / "podman"
    engine.write_text(ENGINE.format(folder=tmp_path))
    engine.chmod(0o755)
    deployment = Deployment(account)
    environment = {"PATH": f"{tmp_path}:{account.environment['PATH']}"}
    options = ["-e", "ecr_image=", "--tags", "ecr_run,ecr_image"]
    check = deployment.deploy("--check", *options, **environment)
    assert check.returncode == 0, check.output
    assert "Would build" in check.output

    run = deployment.deploy(*options, **environment)
    assert run.returncode == 0, run.output
    calls = (tmp_path / "asked").read_text().splitlines()
    verbs = [line.split()[0] for line in calls if not line.startswith("info")]
    assert verbs == ["build", "login", "push"]
    (image,) = account.client("ecr").list_images(repositoryName="iot-system/collector")["imageIds"]
    assert calls[-1].endswith(f"iot-system/collector:{image['imageTag']}")
    password = (tmp_path / "password").read_text()
    assert password
    assert password not in run.output + "\n".join(calls)
    assert not Path((tmp_path / "auth").read_text().strip()).exists()

    again = deployment.deploy(*options, **environment)
    assert (again.returncode, again.changed) == (0, 0), again.output
    other = deployment.deploy(
        *options, "-e", '{"ecr_build_arguments": {"REVISION": "other"}}', **environment
    )
    assert other.changed == 2, other.output  # a changed build argument: build and push
    assert (
        len(account.client("ecr").list_images(repositoryName="iot-system/collector")["imageIds"])
        == 2
    )
