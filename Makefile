# All targets need Python 3.10 to 3.12 and a C++ compiler. Everything else is installed into .venv/.
.DEFAULT_GOAL := help
.PHONY: help python env demo requirements demo demo-scratch experiments landmarks test \
	test-long test-gpu test-openmmlab coverage mutants lint audit docs clean-env

# The interpreter of an existing .venv/ is tried first, so that a newer python3 does not replace it.
PYTHON ?= $(shell for python in "$$(readlink -f .venv/bin/python)" python3 python3.12 python3.11 python3.10; do \
	"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

python:
	@test -n '$(PYTHON)' || { echo 'no Python 3.10, 3.11 or 3.12 was found: apt install python3 python3-venv' \
	'python3-dev, or name one with `make PYTHON=/path/to/python3 ...`.' >&2; exit 1; }

# uv is pinned with the other packages. It compiles mmcv once and keeps the wheel in its cache, outside this folder.
# FORCE_CUDA=1 compiles mmcv again, with CUDA operators; the setting is a part of the wheel's key in the cache.
UV_VERSION := $(shell sed -n 's/^uv==//p' requirements/test.in)
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
export MAX_JOBS
# $(call with_cuda,distribution of mmcv)
with_cuda = $(if $(filter 1,$(FORCE_CUDA)),--reinstall-package $(1) --config-settings-package $(1):FORCE_CUDA=1)

# uv keeps an installed mmcv when the pinned torch changes, so mmcv is uninstalled first.
# Another PYTHON makes the environment again.
# $(call make_venv,folder of the environment,name of its requirements,distribution of mmcv)
print_version = import sys; print(sys.version_info[:2])
define make_venv
@ls $(1)/lib/python*/site-packages/mmcv >/dev/null 2>&1 || { '$(PYTHON)' .dev_scripts/preflight.py \
	&& echo 'setting up $(1): the first time on a machine takes 10 to 15 minutes, most of them to compile mmcv'; }
@test "$$($(1)/bin/python -c 'import pip; $(print_version)' 2>/dev/null)" = "$$('$(PYTHON)' -c '$(print_version)')" \
	|| '$(PYTHON)' -m venv --clear $(1)
@test -x $(1)/bin/uv || $(1)/bin/python -m pip install -q uv==$(UV_VERSION)
@ls -d $(1)/lib/python*/site-packages/torch-$(shell sed -n 's/^torch==//p' requirements/$(2).in)*.dist-info \
	>/dev/null 2>&1 || $(1)/bin/uv pip uninstall -q --python $(1) $(3)
endef

# mmcv's build requires the CUDA compiler if it sees a GPU.
hide_gpu = $(if $(filter 1,$(FORCE_CUDA)),,CUDA_VISIBLE_DEVICES=)

env: python ## make .venv/ (takes 10 to 15 minutes the first time on a machine)
	$(call make_venv,.venv,maintained,onedl-mmcv)
	@$(hide_gpu) .venv/bin/uv pip sync --no-python-downloads --python .venv $(call with_cuda,onedl-mmcv) \
		requirements/maintained.txt

requirements: env ## resolve requirements/*.in again, keeping the pinned versions where they fit
	for stack in maintained openmmlab gpu; do UV_CUSTOM_COMPILE_COMMAND='make requirements' .venv/bin/uv pip compile -q \
		--universal --fork-strategy fewest --python-version 3.10 --generate-hashes \
		requirements/$$stack.in -o requirements/$$stack.txt || exit; done

demo: env ## run the demo
	.venv/bin/python -m projects.photo_digits.demo

demo-scratch: env ## run the demo, training from scratch
	.venv/bin/python -m projects.photo_digits.demo --from-scratch

experiments: env ## train with each attention, several seeds, on images and on sequences (hours)
	.venv/bin/python -m projects.attention_study photo-digits --seeds 0 1 2 3 4
	.venv/bin/python -m projects.attention_study stage-4 --seeds 0 1 2 3 4
	.venv/bin/python -m projects.attention_study listops
	.venv/bin/python -m benchmarks attn-soft attn-soft-norm attn-softmax-fused attn-softmax-plain attn-linformer \
		attn-performer attn-nystrom attn-spatial-reduction attn-gaussian --sizes 128 256 512 1024 --repeats 5 --seconds 10 \
		--json work_dirs/attention/tokens.json --png work_dirs/attention/tokens.png

landmarks: env ## continue training the demo's detector and segmentor with few and many landmarks (hours)
	.venv/bin/python -m projects.attention_study.landmark_bounds

# One process per core and one thread per process. A file's tests stay in one process, which shares its fixtures.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist loadfile

test: env ## run the tests
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST)

test-long: env ## run the tests that take minutes each
	.venv/bin/python -m pytest -m long

test-gpu: python ## run the tests and measurements that need a CUDA GPU, in .venv-gpu/ without the toolboxes
	@nvidia-smi -L >/dev/null 2>&1 || { echo 'make test-gpu needs a CUDA GPU, and nvidia-smi finds none.' >&2; exit 1; }
	@test -x .venv-gpu/bin/uv || { '$(PYTHON)' -m venv --clear .venv-gpu \
		&& .venv-gpu/bin/python -m pip install -q uv==$(UV_VERSION); }
	@.venv-gpu/bin/uv pip sync -q --no-python-downloads --python .venv-gpu requirements/gpu.txt
	.venv-gpu/bin/python -m pytest -m gpu tests/gpu
	.venv-gpu/bin/python -m benchmarks soft-tiny timm-resnet-50 --peer timm-swin-tiny --sizes 224 800x1344 \
		--batch-size 8 --device cuda
	.venv-gpu/bin/python -m benchmarks soft-tiny timm-resnet-50 --peer timm-swin-tiny --sizes 224 800x1344 \
		--batch-size 8 --device cuda --train

# mmcv 2.1 is compiled with these packages of the environment. The version of torch is a part of the wheel's key in the cache.
BUILD_OF_OPENMMLAB := $(shell grep -E '^(torch|setuptools|ninja)==' requirements/openmmlab.in)

test-openmmlab: python ## run the tests with OpenMMLab's own packages, in .venv-openmmlab/
	$(call make_venv,.venv-openmmlab,openmmlab,mmcv)
	@.venv-openmmlab/bin/uv pip install -q --no-python-downloads --python .venv-openmmlab $(BUILD_OF_OPENMMLAB)
	@$(hide_gpu) MMCV_WITH_OPS=1 PATH="$(CURDIR)/.venv-openmmlab/bin:$$PATH" .venv-openmmlab/bin/uv pip sync \
		--no-python-downloads --python .venv-openmmlab $(call with_cuda,mmcv) \
		--config-settings-package mmcv:torch=$(filter torch==%,$(BUILD_OF_OPENMMLAB)) requirements/openmmlab.txt
	OMP_NUM_THREADS=1 .venv-openmmlab/bin/python $(PYTEST)

# The processes that the tests start are not counted.
coverage: env ## run the tests, and print the lines of soft_mm/ that they do not reach
	OMP_NUM_THREADS=1 .venv/bin/uv run -q --no-project --no-python-downloads --python .venv/bin/python \
		--with pytest-cov==7.0.0 python $(PYTEST) --cov=soft_mm --cov-report=term-missing:skip-covered --cov-fail-under=95

# uv installs cosmic-ray into a separate environment in its cache. Each part takes 40 minutes on one core.
mutants: env ## mutation testing of soft_mm/ops and soft_mm/checkpoints
	for part in ops checkpoints; do .venv/bin/uv run -q --no-project --no-python-downloads --python .venv/bin/python \
		--with cosmic-ray==8.7.0 python .dev_scripts/mutants.py $$part || exit; done

lint: env ## run ruff, mypy and the checks of the workflow and the form
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/python -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	.venv/bin/python -m check_jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug_report.yml

# pip-audit needs a hash for every package, so the line of this package is left out. With --strict, a package that cannot
# be looked up is an error instead of a note.
PIP_AUDIT := .venv/bin/uv tool run -q --no-python-downloads --python .venv/bin/python pip-audit==2.10.1 \
	--strict --disable-pip --progress-spinner off

audit: env ## look up known vulnerabilities of all pinned packages (sends their names and versions to PyPI)
	@code=0; for stack in maintained openmmlab; do echo "requirements/$$stack.txt:"; \
		sed '/^-e /d' requirements/$$stack.txt | $(PIP_AUDIT) -r /dev/stdin || code=1; done; exit $$code

docs: env ## build the documentation site in site/
	.venv/bin/python -m mkdocs build --strict

clean-env: ## remove .venv/, .venv-openmmlab/ and .venv-gpu/; the packages stay in uv's cache
	rm -rf .venv .venv-openmmlab .venv-gpu
