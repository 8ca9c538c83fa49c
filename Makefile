# `make demo` or `make test` in a fresh clone does all set-up by itself; the stamp file makes that happen once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VIEWER := engine/serve/viewer
TORCH := $(shell grep -E '^torch==' constraints.txt)
WITH_PICTURES := bench/graphs.py bench/hole_energy.py bench/quality.py  # of one's own
BENCHES := $(sort $(filter-out bench/_% $(WITH_PICTURES),$(wildcard bench/*.py)))

.PHONY: help setup demo serve viewer test check format bench clean

help:
	@echo "make demo    restore three photographs and write before/after sheets"
	@echo "make serve   the web page and its service on http://127.0.0.1:8000/ (needs npm)"
	@echo "make test    all tests"
	@echo "make check   ruff, pyright, import-linter"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   the claims of speed and memory, one file each"

setup: $(READY)

# torch first, by itself: with this exact version pip finds a CPU build where one is on disk, and the loose
# requirement of the project then pulls nothing more.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m demo.demo

serve: $(READY) viewer
	$(BIN)/engine serve

viewer: $(VIEWER)/openseadragon/openseadragon.min.js

# What the page shows pictures with comes from its npm package, pinned by the lock file.
$(VIEWER)/openseadragon/openseadragon.min.js: $(VIEWER)/package-lock.json
	cd $(VIEWER) && npm ci --silent --no-audit --no-fund
	rm -rf $(VIEWER)/openseadragon
	cp -r $(VIEWER)/node_modules/openseadragon/build/openseadragon $(VIEWER)/openseadragon
	cp $(VIEWER)/node_modules/openseadragon/LICENSE.txt $(VIEWER)/openseadragon/
	rm -rf $(VIEWER)/node_modules
	touch $@

test: $(READY)
	$(BIN)/python -m pytest -q

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@echo "benches: $(if $(BENCHES),$(BENCHES),none yet)"
	@set -e; for file in $(BENCHES); do echo "== $$file"; $(BIN)/python "$$file"; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
