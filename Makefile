# The two commands: `make demo` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3.12
BIN := .venv/bin

.PHONY: demo test setup clean

demo: setup
	$(BIN)/python -m sam3_lora_wrapper.demo

test: setup .venv/.test
	$(BIN)/python -m pytest tests

setup: .venv/.installed
	@$(BIN)/python patches/apply.py

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/.test: requirements-test.txt .venv/.installed
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	@touch $@

clean:
	rm -rf .venv sam3 outputs
