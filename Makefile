# make demo       install, then the whole path on this machine in a few minutes
# make test       install, lint, the CPU test suite without the cases marked `long`
# make test-all   the same with them, as CI does
# All start from a fresh clone and may be run again at any time.

VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := python3.12 python3 python3.13
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-all lint install clean

demo: install
	@$(BIN)/python tools/demo.py

# Two workers; a file always runs on one of them, and the longest files start first (tests/conftest.py).
# Triton chooses its interpreter when it is imported, so the interpreted tests have a run of their own.
WORKERS ?= 2
# A worker that dies ends the run: xdist would wait for it for ever.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0

test: install lint
	@failed=0; \
	$(PYTEST) $(LONG) || failed=1; \
	TRITON_INTERPRET=1 $(PYTEST) $(LONG) || failed=1; \
	exit $$failed

test-all:
	@$(MAKE) test LONG=--long

lint: install
	@$(BIN)/ruff check .

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	@$(if $(PYTHON),,echo "make: needs Python 3.12 or newer; install it, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is older than Python 3.12; name a newer one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV) (about 7 GB, minutes; once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs/demo
