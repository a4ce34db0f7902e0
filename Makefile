# Everything a new machine needs is set up by the first target that wants it: Python 3.11, make and git are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := .venv-bench
WATCH := .venv-bench-watch
FRAMEWORKS := .venv-frameworks
RIVALS := .venv-rivals
# A second thread costs more than it gives on networks as small as these.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-frameworks check format clinic clinic-rivals bench bench-watch clean

demo: $(READY)
	$(BIN)/unstuck demo $(FAULT)

# Two at a time: most of the time goes to one processor. One alone: make test WORKERS=0
test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(or $(WORKERS),2) --dist loadfile

# Hugging Face and Lightning in an environment of their own; where they cannot be installed the tests are skipped, aloud.
test-frameworks: $(READY)
	$(MAKE) $(FRAMEWORKS)/.ready || echo "the frameworks of clinic/scripts/requirements.txt cannot be installed here"
	$$(test -e $(FRAMEWORKS)/.ready && echo $(FRAMEWORKS) || echo $(VENV))/bin/python -m pytest -m "" -rs tests/record/test_frameworks.py

$(FRAMEWORKS)/.ready: pyproject.toml constraints.txt clinic/scripts/requirements.txt
	rm -rf $(FRAMEWORKS)
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r clinic/scripts/requirements.txt \
		-e . pytest pytest-timeout scikit-learn
	touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# All of it takes hours, and goes on where it stopped: make clinic ARGS="--strength clear --seeds 1", or --smoke
clinic: $(READY)
	$(BIN)/python -m clinic $(ARGS)

# Unstuck beside the published rivals on the same trainings: make clinic-rivals ARGS="--program tabular"
clinic-rivals: $(RIVALS)/.ready
	$(RIVALS)/bin/python -W ignore -m clinic.rivals $(ARGS)

$(RIVALS)/.ready: pyproject.toml constraints.txt clinic/rivals/requirements.txt
	test -d $(RIVALS) || $(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(RIVALS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[studies]' -r clinic/rivals/requirements.txt
	touch $@

# All networks, or some: make bench ARGS="mlp --quick"
bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/curvature.py $(or $(ARGS),all)

$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -d $(BENCH) || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[studies]' -r benchmarks/requirements.txt
	touch $@

# What watching costs, beside its peers: make bench-watch ARGS="--quick"
bench-watch: $(WATCH)/.ready
	$(WATCH)/bin/python benchmarks/watch.py $(ARGS)

$(WATCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements-watch.txt
	test -d $(WATCH) || $(PYTHON) -m venv $(WATCH)
	$(WATCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(WATCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[studies]' -r benchmarks/requirements-watch.txt
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unstuck needs Python 3.11 or newer, got " + sys.version.split()[0] + ": set PYTHON=python3.11")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[studies,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) $(WATCH) $(FRAMEWORKS) $(RIVALS) .pytest_cache .ruff_cache
