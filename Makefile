# Two commands do everything on a fresh machine with Python 3.10 or later: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
# on few cores, threads that wait for one another must sleep: spinning, they keep the loader's workers from running
export OMP_WAIT_POLICY ?= passive

.PHONY: demo app test test-fast lint benchmarks clean

demo: .venv/installed  ## pretrain a tiny MAE on real digits, probe it, draw what it sees
	$(BIN)/python -m demo.run

app: .venv/installed  ## the page of reconstructions, on the demo's model
	$(BIN)/python demo/app.py

test: .venv/installed  ## all tests
	$(BIN)/python -m pytest

test-fast: .venv/installed  ## without the slow ones
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-dev.txt demo/requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or later is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -r requirements-dev.txt
	@touch $@

benchmarks: .venv/installed  ## measure what this machine can, and fill the tables of BENCHMARKS.md
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m pytest tests/test_speed.py tests/test_gpu_decode.py

clean:
	rm -rf .venv demo/output
