# `make demo` and `make test` work on a fresh clone: each installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
# One process per core. A test file stays in one process, because its tests share models.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: demo test test-all lint clean

demo: .venv/installed
	$(BIN)/python fineweb.py --dataset stdlib --train_tokenizer 4096 --out_dir data/demo
	$(BIN)/python train_gpt2.py --config configs/demo.yaml
	$(BIN)/python finetune_lora.py --config configs/demo_lora.yaml
	$(BIN)/python sample.py --model runs/demo_lora --temperature 0 \
	    --instruction "def open_file(filename, mode='r'):"

test: .venv/installed-dev
	$(PYTEST) -m "not slow"

test-all: .venv/installed-dev
	$(PYTEST)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

# These empty files are made only when an installation is complete, so make repeats an interrupted
# one. The first line stops with a message if Python is too old.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit( \
	    "Python 3.11 or newer is required, found %d.%d; try: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@
