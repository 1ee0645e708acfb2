# All targets need Python 3.10 to 3.12 and a C++ compiler. Everything else is installed into .venv/.
.DEFAULT_GOAL := help
.PHONY: help python env demo demo-scratch experiments landmarks test test-long test-openmmlab lint clean-env

# The interpreter of an existing .venv/ is tried first, so that a newer python3 does not replace it.
PYTHON ?= $(shell for python in "$$(readlink -f .venv/bin/python)" python3 python3.12 python3.11 python3.10; do \
	"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

python:
	@test -n '$(PYTHON)' || { echo 'no Python 3.10, 3.11 or 3.12 was found: apt install python3 python3-venv' \
	'python3-dev, or name one with `make PYTHON=/path/to/python3 ...`.' >&2; exit 1; }

env: python ## make .venv/ (takes 10 to 15 minutes the first time)
	@'$(PYTHON)' .dev_scripts/setup_env.py

demo: env ## run the demo
	.venv/bin/python -m projects.photo_digits.demo

demo-scratch: env ## run the demo, training from scratch
	.venv/bin/python -m projects.photo_digits.demo --from-scratch

experiments: env ## train with each attention, several seeds, on images and on sequences (hours)
	.venv/bin/python -m projects.attention_study photo-digits --seeds 0 1 2 3 4
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

test-openmmlab: python ## run the tests with OpenMMLab's own packages, in .venv-openmmlab/
	@'$(PYTHON)' .dev_scripts/setup_env.py --openmmlab
	OMP_NUM_THREADS=1 .venv-openmmlab/bin/python $(PYTEST)

lint: env ## run ruff, as pre-commit does
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

clean-env: ## remove .venv/ and .venv-openmmlab/
	rm -rf .venv .venv.lock .venv-openmmlab .venv-openmmlab.lock
