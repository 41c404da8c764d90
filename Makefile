# Two commands do everything on a fresh machine with Python 3.10 or later: make demo, make test. Each installs what it
# needs, and no more.
PYTHON ?= python3
BIN := .venv/bin
# on few cores, threads that wait for one another must sleep: spinning, they keep the loader's workers from running
export OMP_WAIT_POLICY ?= passive

.PHONY: demo demo-digits app test test-fast lint benchmarks clean

demo: .venv/demo  ## pretrain a tiny MAE on emoji, probe it, draw what it sees
	@$(BIN)/python -m demo.run

demo-digits: .venv/page  ## the same on scikit-learn's handwritten digits
	@$(BIN)/python -m demo.run digits

app: .venv/page  ## the page of reconstructions, on the demo's model
	@$(BIN)/python demo/app.py

# several files at a time: many tests wait for processes that they start
TESTS = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: .venv/installed  ## all tests
	$(TESTS)

test-fast: .venv/installed  ## without the slow ones
	$(TESTS) -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

INSTALL = $(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check

.venv/new:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or later is needed: make PYTHON=python3.12 ...')"
	@echo "Installing into .venv; on Linux PyTorch with its libraries for GPUs is a download of 3 GB"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/demo: requirements.txt demo/requirements-demo.txt | .venv/new
	@$(INSTALL) -r demo/requirements-demo.txt
	@touch $@

.venv/page: requirements.txt demo/requirements.txt | .venv/new
	@$(INSTALL) -r requirements.txt -r demo/requirements.txt
	@touch $@

.venv/installed: requirements.txt requirements-dev.txt demo/requirements.txt | .venv/new
	@$(INSTALL) -r requirements-dev.txt
	@touch $@ .venv/demo .venv/page

benchmarks: .venv/installed  ## measure what this machine can, and fill the tables of BENCHMARKS.md
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m pytest tests/test_speed.py tests/test_gpu_decode.py

clean:
	rm -rf .venv demo/output
