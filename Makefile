# `make up` installs and starts everything on a fresh Debian 12. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Ansible requires a UTF-8 locale, and a minimal system has only this one.
export LC_ALL := C.UTF-8
# Ansible starts a Python process for each task. Without bytecode files, compiling the imports takes longer than most tasks.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
ROOT := $(filter 0,$(shell id -u))

# The state directory, see roles/platform/defaults/main.yml. If you set STATE=/elsewhere, set it in every call.
STATE ?= $(if $(ROOT),/var/lib/iot-system,$(HOME)/.local/state/iot-system)
PLAYBOOK = $(VENV)/bin/ansible-playbook $(if $(filter-out file,$(origin STATE)),-e iot_state_dir=$(STATE))

# The platform for verify and clean: this machine (host) or Kubernetes (local).
TARGET ?= host

# More options for ansible-playbook: make up EXTRA='-e postgres_port=15432'
EXTRA ?=

# The packages that the roles install on this machine (tests/test_makefile.py compares the lists). They are listed here only
# to find out whether sudo is needed.
PACKAGES := python3-venv mosquitto mosquitto-clients postgresql prometheus prometheus-node-exporter prometheus-postgres-exporter
SUDO := $(if $(ROOT),,sudo)
# Asks for the sudo password only if a package is missing and sudo requires a password.
ASK_BECOME = $(if $(ROOT),,$(shell dpkg-query --show $(PACKAGES) >/dev/null 2>&1 || sudo -n true 2>/dev/null || ! command -v sudo >/dev/null || echo --ask-become-pass))

.PHONY: help
help: ## Show this list
	@echo 'make <target>, where <target> is one of'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'
	@echo "Options: EXTRA='-e postgres_port=15432'   any option of ansible-playbook, for up, local, test, down and clean"
	@echo "         TARGET=local   verify or delete what \`make local\` has deployed"
	@echo "         STATE=$(STATE)   directory of all files"

.PHONY: up
up: $(VENV)/.deploy ## Install what is missing, start everything, send some messages, show the services and their addresses
	@$(PLAYBOOK) playbooks/host.yml $(ASK_BECOME) $(EXTRA)

.PHONY: local
local: $(VENV)/.deploy ## The same on Kubernetes: start minikube, deploy, wait until everything is ready
	@$(PLAYBOOK) playbooks/local.yml $(EXTRA)

.PHONY: simulate
simulate: $(STATE)/bin/iot-collector ## Let five simulated devices publish 500 messages in 10 seconds
	@$(STATE)/bin/iot-collector simulate --devices 5 --rate 50 --count 500

.PHONY: status
status: $(STATE)/bin/iot-status ## Show the programs, their addresses and the message counts
	@-$(STATE)/bin/iot-status --next

$(STATE)/bin/iot-%:
	@echo 'Nothing is installed in $(STATE). `ansible-playbook playbooks/host.yml` (`make up`) installs and starts everything.'
	@false

.PHONY: down
down: $(VENV)/.deploy ## Stop everything and keep the data
	@$(PLAYBOOK) playbooks/teardown.yml $(EXTRA)

.PHONY: clean
clean: $(VENV)/.deploy ## Stop everything and delete the data (asks first, except with YES=1)
	@$(PLAYBOOK) playbooks/teardown.yml -e target=$(TARGET) -e remove_data=true $(if $(filter 1 yes,$(YES)),-e confirm=true) $(EXTRA)

.PHONY: verify
verify: $(VENV)/.deploy ## Follow one message from the broker to the table and to Prometheus
	@$(PLAYBOOK) playbooks/verify.yml -e target=$(TARGET) $(EXTRA)

.PHONY: test
test: lint pytest ## Run all checks (installs what the checks need)

# ansible-lint is given paths: without them it looks at every file of the repository, which takes minutes.
.PHONY: lint
lint: $(VENV)/.dev ## Check style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests/conftest.py
	$(VENV)/bin/mypy tests/aws/conftest.py
	$(VENV)/bin/yamllint --strict .
	$(VENV)/bin/hadolint collector/Dockerfile
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH ansible-lint galaxy.yml inventories meta molecule playbooks requirements.yml roles/*
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH actionlint
	$(VENV)/bin/shellcheck .ci/*

.PHONY: molecule
molecule: $(VENV)/.dev $(VENV)/emulator/.stamp packages ## Run only Molecule's scenarios
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH molecule test --all

# Three workers keep two cores busy, because many tests wait most of the time.
.PHONY: pytest
pytest: $(VENV)/.dev $(VENV)/checkov/.stamp $(VENV)/emulator/.stamp packages ## Run all tests, Molecule's scenarios included
	$(VENV)/bin/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

.PHONY: bench
bench: $(VENV)/.dev packages ## Compare the collector with other clients, side by side (BENCH='--full' takes 25 minutes)
	$(PIP) -e '.[bench]'
	$(VENV)/bin/python -m benchmarks $(BENCH)

.PHONY: test-faults
test-faults: $(VENV)/.dev $(VENV)/emulator/.stamp packages ## Run the fault tests, with many more repetitions than in test
	FAULTS=full $(VENV)/bin/python -m pytest -m faults -rP

.PHONY: packages
packages: PACKAGES += prometheus-alertmanager openssh-server python3-packaging chromium
packages: $(VENV)/.deploy
	@$(PLAYBOOK) tests/packages.yml --tags packages $(ASK_BECOME) $(EXTRA)

# --- the virtual environment -------------------------------------------------------------------------------------
# The stamp file is newer than pyproject.toml if its dependencies are installed. Bytecode is not compiled: for all of Ansible's
# collections, that takes longer than the rest of the installation.
PIP = $(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check

$(VENV)/.deploy: pyproject.toml | $(VENV)/bin/pip
	@echo 'Installing Ansible into $(VENV) (once, about a minute)'
	@$(PIP) -e '.[deploy]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/uv
	@echo 'Installing the test tools into $(VENV)'
	@$(UV) $(VENV)/bin/python -e '.[dev]'
	@touch $@ $(VENV)/.deploy

# uv installs the test environments in seconds; pip takes minutes. uv does not read pip's settings, so the index is passed on.
$(VENV)/bin/uv: | $(VENV)/bin/pip
	@$(PIP) uv
UV = $(if $(PIP_INDEX_URL),UV_DEFAULT_INDEX=$(PIP_INDEX_URL)) $(VENV)/bin/uv pip install --quiet --python

# checkov has a separate environment, because it requires old releases of packages that others use.
$(VENV)/checkov/.stamp: pyproject.toml | $(VENV)/bin/uv
	@echo 'Installing checkov into $(VENV)/checkov'
	@$(PYTHON) -m venv --without-pip $(VENV)/checkov
	@$(UV) $(VENV)/checkov/bin/python 'checkov>=3.2,<4'
	@touch $@

# The emulator of AWS, with the AWS CLI and the package that it signs certificates with. It has a separate environment,
# because it requires one release of botocore.
$(VENV)/emulator/.stamp: pyproject.toml | $(VENV)/bin/uv
	@echo 'Installing the emulator of AWS into $(VENV)/emulator'
	@$(PYTHON) -m venv --without-pip $(VENV)/emulator
	@$(UV) $(VENV)/emulator/bin/python 'ministack==1.5.33' boto3 cryptography 'awscli<2'
	@touch $@

# On a fresh Debian, Python cannot create virtual environments: the package python3-venv is missing.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo '$(PYTHON) is missing or older than 3.11. Choose another: make up PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'Installing python3-venv, which creates virtual environments'; \
	  { $(SUDO) apt-get -qq update && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	      apt-get -qq install --no-install-recommends python3-venv >/dev/null; } \
	  || { echo 'The installation failed. As root, run: apt-get install python3-venv'; exit 1; }; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
