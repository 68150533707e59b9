# Every target starts from a bare checkout: Python >= 3.11 and make are enough. Nothing needs a GPU.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-fast test-long check bench-smoke docs clean

# torch goes first and alone: asked for by another package, it would arrive in another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,build,rtx,dev]'
	touch $@

demo: $(INSTALLED)  ## The paper's result on an exported graph: build, validate, run.
	$(BIN)/gap-export build --model shapes --keep 0.25 --replace --output out/shapes
	$(BIN)/gap-export run out/shapes --image docs/images/scene.png --refer "$$(cat docs/images/scene.txt)" --draw out/answer.png
	$(BIN)/gap-export validate out/shapes

test: $(INSTALLED)  ## What continuous integration runs.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

test-fast: $(INSTALLED)  ## For development: without the tests that build many graphs or engines.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope -m 'not slow and not long'

test-long: $(INSTALLED)  ## Soak and kill tests, and thousands of hostile inputs; their table is printed.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

check: $(INSTALLED)  ## Format, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench-smoke: $(INSTALLED)  ## Latency ratios of the bundled model, under three minutes.
	$(BIN)/python bench/latency.py --smoke

docs: $(INSTALLED)  ## Regenerate docs/commands.md from the commands, and the generated parts of other documents.
	$(BIN)/typer gap_export.cli utils docs --name gap-export --output docs/commands.md
	$(BIN)/python docs/generate.py

clean:
	rm -rf out .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
