# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`. Each makes .venv when it is
# needed, and does nothing when .venv is as new as pyproject.toml and constraints.txt.

# The first Python on the path that is new enough; `make PYTHON=/path/to/python3.12 ...` takes another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
WORKERS ?= 2
PYTEST = .venv/bin/python -m pytest
# One thread a worker: the tests' models are too small to gain from more, and the workers would fight over the cores.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The tests start Python dozens of times: each start after the first reads what was compiled.
unexport PYTHONDONTWRITEBYTECODE

# A .venv made elsewhere (the folder was moved or copied) is made again.
ifneq ($(wildcard .venv),)
ifeq ($(shell grep -F '$(CURDIR)/.venv' .venv/pyvenv.cfg 2>/dev/null),)
STALE = stale
endif
endif

.PHONY: help demo test test-slow torture lint format stale clean
.SECONDARY:

help:
	@echo 'make demo       tune the tiny model on generated product photos, with controls (minutes on a CPU)'
	@echo 'make test       the tests, without the slow ones'
	@echo 'make test-slow  controls of the demo, scanned digits, long runs'
	@echo 'make torture    runs killed, stopped and starved at random moments (hours; RUNS=20 for fewer)'
	@echo 'make lint       formatting, lint rules, types'
	@echo 'make format     format and sort imports in place'
	@echo 'make clean      remove .venv and the caches of the tools; runs/ stays'

demo: .venv/ready-demo
	.venv/bin/python -m phi3v demo
	@echo '(the command phi3v is in .venv/bin; ". .venv/bin/activate" puts it on the path)'

# A file's tests stay with one worker, so that what they share (a trained run, say) is made once.
test: .venv/ready-test
	$(ONE_THREAD) $(PYTEST) -m "not slow and not torture" -n $(WORKERS) --dist loadfile -q -rfEs $(ARGS)

test-slow: .venv/ready-test
	$(PYTEST) -m slow -q -rfEs $(ARGS)

torture: .venv/ready-test
	$(ONE_THREAD) PHI3V_TORTURE=$(or $(RUNS),100) $(PYTEST) -m torture -q -rfEs $(ARGS)

lint: .venv/ready-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/ready-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# What each command needs, and no more: the library alone, with the tests' tools, with the developer's.
EXTRAS_demo =
EXTRAS_test = [test]
EXTRAS_dev = [dev]
# What else is there when it is.
LESS_test = demo
LESS_dev = demo test

# Not compiled: pip would compile every file of transformers and torch, minutes for one processor; Python compiles those
# that are imported, once.
.venv/ready-%: pyproject.toml constraints.txt $(STALE)
	@test -n '$(PYTHON)' || { echo 'phi3v needs Python 3.11 or newer with its venv module; none was found on the path (on Debian: apt install python3 python3-venv)' >&2; exit 1; }
	@test -x .venv/bin/python && .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'making .venv with $(PYTHON)'; $(PYTHON) -m venv --clear .venv; }
	@echo 'installing phi3v$(EXTRAS_$*) (minutes the first time: torch is large)'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.$(EXTRAS_$*)'
	@touch $@ $(foreach less,$(LESS_$*),.venv/ready-$(less))

stale:
	rm -rf .venv

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build
