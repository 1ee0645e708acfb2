# Targets need a Python 3.10 to 3.12 and a C++ compiler; everything else goes into .venv/.
.DEFAULT_GOAL := help
.PHONY: help python env demo demo-scratch experiments landmarks test test-long test-openmmlab lint clean-env

# The interpreter that .venv/ was made with comes first, so that a later python3 does not replace it.
PYTHON ?= $(shell for python in "$$(readlink -f .venv/bin/python)" python3 python3.12 python3.11 python3.10; do \
	"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

python:
	@test -n '$(PYTHON)' || { echo 'no Python 3.10, 3.11 or 3.12 was found: apt install python3 python3-venv' \
	'python3-dev, or name one with `make PYTHON=/path/to/python3 ...`.' >&2; exit 1; }

env: python ## make .venv/ (10 to 15 minutes the first time, nothing after that)
	@'$(PYTHON)' tools/setup_env.py

demo: env ## run the demo
	.venv/bin/python tools/demo.py

demo-scratch: env ## run the demo, training from scratch
	.venv/bin/python tools/demo.py --from-scratch

experiments: env ## compare attentions by training each with several seeds, on images and on sequences (hours)
	.venv/bin/python tools/compare_attention.py photo-digits --seeds 0 1 2 3 4
	.venv/bin/python tools/compare_attention.py listops
	.venv/bin/python tools/benchmark_tokens.py attn-soft attn-soft-norm attn-softmax-fused attn-softmax-plain attn-linformer \
		attn-performer attn-nystrom attn-spatial-reduction attn-gaussian --sizes 128 256 512 1024 --repeats 5 --seconds 10 \
		--json work_dirs/attention/tokens.json --png work_dirs/attention/tokens.png

landmarks: env ## train the demo's detector and segmentor on with few and many landmarks (hours)
	.venv/bin/python tools/compare_landmarks.py

test: env ## run the tests
	.venv/bin/python -m pytest

test-long: env ## run the tests that take minutes
	.venv/bin/python -m pytest -m long

test-openmmlab: python ## run the tests beside OpenMMLab's own packages, in .venv-openmmlab/
	@'$(PYTHON)' tools/setup_env.py --openmmlab
	.venv-openmmlab/bin/python -m pytest

lint: env ## ruff, as pre-commit runs it
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

clean-env: ## remove .venv/ and .venv-openmmlab/
	rm -rf .venv .venv.lock .venv-openmmlab .venv-openmmlab.lock
