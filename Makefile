# make env: the environment; make test: the whole suite; make test-newest: a part of it on Python 3.12 with the newest jax and flax;
# make test-slurm: jobs in a real Slurm of one node, which needs Debian's slurm-wlm and munge; make demo: three stages at tiny size and a
# report. Each works in a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
# The first that runs: one on the path, or one of pyenv's.
FIND_NEWEST := for python in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python3.12; do \
	"$$python" -c 'import venv' 2>/dev/null && echo "$$python" && break; done
# Models, a training step on 8 devices, resuming, sampling, weights there and back; clips, records and README's road. None needs PyTorch.
LAWS := $(addprefix tests/models/,test_wan_dit.py test_references.py test_attend.py test_rope3d.py test_lora.py) \
	$(addprefix tests/data_pipelines/,test_clips.py test_display.py test_streams.py test_hdr.py test_frame_times.py test_clip_matrix.py) \
	tests/data_pipelines/test_encode.py tests/launch/test_road.py tests/test_mesh.py tests/test_dependencies.py \
	tests/train/test_loop.py::test_resumed_equals_uninterrupted tests/test_samplers.py tests/weights/test_convert.py

.PHONY: env test test-newest test-slurm demo lint

env: $(VENV)/ready

# Rebuilt when the dependencies change. torch is installed by name first, so that the pinned build is the one that stays.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

test: env
	$(BIN)/python -m pytest

# Pinned to nothing, so that it finds what a user of today would.
$(NEWEST)/ready: pyproject.toml
	"$$($(FIND_NEWEST))" -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check -e . pytest pytest-xdist beartype
	touch $@

test-newest:
	@if [ -z "$$($(FIND_NEWEST))" ]; then echo "make test-newest: skipped, no Python 3.12 is installed"; else \
		$(MAKE) --no-print-directory $(NEWEST)/ready && $(NEWEST)/bin/python -m pytest $(LAWS); fi

test-slurm: env
	tests/launch/with_slurm.sh $(BIN)/python -m pytest -n 0 -s -o faulthandler_timeout=0 -m slow tests/launch/test_slurm.py

demo: env
	$(BIN)/python -m launch.demo --out=out/demo

lint: env
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
