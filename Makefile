# Two commands do all the set-up: `make run` (the night of configs/sentiment.yaml) and `make test`.
PYTHON ?= python3
CONFIG ?= configs/sentiment.yaml
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test bench lint types check docs vega lock install clean

run: $(INSTALLED)  ## the night of CONFIG
	@$(BIN)/overnight run $(CONFIG)

test: $(INSTALLED)  ## the tests that need no GPU, no browser and no network
	@$(BIN)/python -m pytest

bench: $(INSTALLED)  ## the measurements of bench/RESULTS.md, side by side with what people use today
	@for name in fit efficiency search tokenize corpus overhead serve load; do $(BIN)/python -m bench.$$name || exit 1; done

install: $(INSTALLED)  ## the environment alone

# uv reads the same lock as pip would, in seconds instead of minutes
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "overnight needs Python 3.11 or newer, got " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@echo "installing the locked environment into $(VENV) (about 7 GB, mostly PyTorch)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps --compile-bytecode -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

lock: $(INSTALLED)  ## resolve the newest versions anew
	@$(BIN)/uv pip compile pyproject.toml --extra demo --extra dashboard --extra server --group dev --universal --python-version 3.11 \
		--generate-hashes --no-header --quiet --upgrade -o requirements.lock

lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: $(INSTALLED)
	@$(BIN)/mypy

docs: $(INSTALLED)  ## docs/configuration.md and docs/commands.md, made from the code
	@$(BIN)/python docs/generate.py

# the one file of others that the project carries: a report must not need the network; vega.LICENSE says whose it is
vega: $(INSTALLED)  ## overnight/report/vega.js.gz, the plotting library inside the reports, bundled anew
	@$(BIN)/uv run --no-project --isolated --with vl-convert-python==1.9.0.post1 python -c "import gzip, vl_convert; \
		script = vl_convert.javascript_bundle(vl_version='6.4').encode(); \
		open('overnight/report/vega.js.gz', 'wb').write(gzip.compress(script, 9, mtime=0))"

check: lint types test  ## all that CI runs

clean:  ## removes the environment; the state of the nights (.overnight) stays
	rm -rf $(VENV)
