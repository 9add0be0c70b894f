# `make demo` shows the product, `make test` is the gate, `make faults` draws more faults than the gate does,
# `make bench` measures (BENCH=--quick: in 3 minutes), `make gpu` checks what only a GPU can show (without one: a dry run).
PYTHON ?= python3
BIN := .venv/bin
# Two processes share the tests; who is ready takes over from who is not. For one file, .venv/bin/pytest alone is quicker.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

define INSTALLING
Installing into .venv. PyTorch with CUDA takes 2.5 GB: minutes, on a slow line many. Who has no GPU needs 200 MB:
stop this, and first run  $(BIN)/python -m pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu
endef
export INSTALLING

.PHONY: demo test faults mutations bench gpu sample-teachers clean

demo: .venv/installed  ## dump the sample's logits, verify them, and compare a student with its twin that has no teacher
	$(BIN)/kd-cache dump --target b
	$(BIN)/kd-cache verify --n 100
	$(BIN)/kd-cache sample-data outputs/demo/data --size large --target b
	$(BIN)/kd-cache dump --target b --json-path outputs/demo/data/dataset.json --cache-root outputs/demo/cache \
		--city2scene-teacher-ckpt data/sample/teachers/teacher_city2scene/A2b/best.safetensors \
		--scene-teacher-ckpt data/sample/teachers/teacher_scene/global/best.safetensors
	$(BIN)/kd-cache student compare --target b --cache-root outputs/demo/cache --output-dir outputs/demo --modes fit \
		--epochs 15 --arch cp_resnet --channels 8,8,16,24

test: .venv/installed-dev  ## the gate: ruff, mypy --strict, every test, one draw of each kind of fault
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

faults: .venv/installed-dev  ## the fault tests with larger draws: 20 minutes
	KD_CACHE_FAULTS=more $(PYTEST) -m faults

mutations: .venv/installed-dev  ## break the product in 35 places, one after the other: does the gate notice? half an hour
	$(BIN)/python tests/mutations.py

bench: .venv/installed-bench  ## measure against real alternatives
	$(BIN)/python -m benchmarks $(BENCH)

gpu: .venv/installed  ## parity with the CPU, precisions, lack of memory, --compile, --deterministic: 8 minutes
	$(BIN)/python -m benchmarks.gpu_checks $(GPU)

sample-teachers: .venv/installed  ## train the committed teachers of the sample again, and a control on shuffled labels
	$(BIN)/kd-cache train all --target all --half --resume fresh --output-dir outputs/sample --cache-root outputs/sample/cache
	$(BIN)/kd-cache train all --target all --half --resume fresh --output-dir outputs/shuffled --shuffle-labels
	for place in teacher_scene/global $(addprefix teacher_city2scene/A2,b c s1 s2 s3); do \
		cp outputs/sample/$$place/best.safetensors data/sample/teachers/$$place/best.safetensors || exit 1; \
	done
	$(BIN)/python docs/sample_figures.py outputs/sample outputs/shuffled

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "$$INSTALLING"
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "$$INSTALLING"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-bench: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "$$INSTALLING"
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
