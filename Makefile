# make sample [AUDIO=x.wav]   install what it needs, then dance to the music: an mp4 with sound and a filmstrip
# make test                   install what it needs, then lint, format check and the whole test suite

PYTHON ?= python3
AUDIO ?= demo/demo.ogg
BIN := .venv/bin
# PyTorch's threads wait for one another asleep, not spinning: else one busy core makes all of them crawl
export GOMP_SPINCOUNT ?= 1000

.PHONY: sample test clean

sample: .venv/run.ok
	$(BIN)/python sample.py --audio $(AUDIO)

test: .venv/test.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

.venv/run.ok: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test.ok: requirements-test.txt .venv/run.ok
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out runs .pytest_cache .ruff_cache
