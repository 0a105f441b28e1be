# One environment, made once: `make demo` and `make test` need nothing but Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo serve docs test test-slow test-page test-triton triton-env test-ray fuzz lint bench bench-chat bench-export bench-7b bench-many bench-gpu bench-engines bench-quantised bench-analysis bench-peers bench-serve soak-serve peers-env shapes study study-cuts study-quantised clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[export,onnxruntime,openvino,tensorrt-rtx,plugin,dev]'
	# Only its Python: the contract test runs it over stand-ins of the libraries, which no public package holds.
	test -d $(VENV)/tensorrt-bindings || \
		$(BIN)/pip install --quiet --no-deps --target $(VENV)/tensorrt-bindings tensorrt-cu13-bindings==11.4.0.106
	touch $@

# A minute on 2 cores behind the installation; its last lines and demo/index.html say what came out.
demo: install
	$(BIN)/python examples/shapes/demo.py --out demo

# The shipped model with OpenAI's API, and a page to look at, at http://127.0.0.1:8000/ until Ctrl-C.
PORT ?= 8000
serve: install
	$(BIN)/himap-export shapes --plan examples/shapes/demo.toml --text-budget 32 --max-new-tokens 16 --slots 8 \
		--overwrite --out build/serve/shapes
	$(BIN)/himap-serve build/serve/shapes --port $(PORT)

# Beside the tests, which leave a part of the cores idle, lint takes no time; what it says comes last.
test: install
	@mkdir -p build; $(MAKE) --no-print-directory lint > build/lint.log 2>&1 & checking=$$!; \
	$(BIN)/pytest -n 2 --dist worksteal; tested=$$?; \
	wait $$checking; linted=$$?; cat build/lint.log; test $$tested -eq 0 -a $$linted -eq 0

test-slow: install
	$(BIN)/pytest -n 2 -m slow

# The server's page in this machine's Chromium; the default suite leaves it out where there is none.
test-page: install
	HIMAP_NEED_BROWSER=1 $(BIN)/pytest tests/serve/test_page.py

# The models that himap-serve --triton writes, on the real tritonserver: no PyTorch, nothing but what a deployment has.
TRITON := .triton-venv
test-triton: install triton-env
	$(BIN)/himap-export shapes --backend onnxruntime --policy dart --k1 1 --policy none --slots 4 \
		--text-budget 48 --max-new-tokens 256 --overwrite --out build/triton/bundle
	HIMAP_TRITON=$(CURDIR)/$(TRITON) HIMAP_TRITON_BUNDLE=$(CURDIR)/build/triton/bundle \
		$(TRITON)/bin/pytest --noconftest -m slow tests/serve/test_tritonserver.py

# The server lies in a wheel, of which nothing else is used. Its Python stub knows NumPy 1 only: numpy1/ is the same
# environment with that one instead.
triton-env: $(TRITON)/.ready

$(TRITON)/.ready: tests/serve/triton-requirements.txt pyproject.toml
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet --requirement $< --editable '.[onnxruntime]'
	test -d $(TRITON)/server || $(TRITON)/bin/pip install --quiet --no-deps --target $(TRITON)/server nvidia-pytriton==0.7.0
	version=$$($(TRITON)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	triton=$(TRITON)/server/pytriton/tritonserver; chmod +x $$triton/bin/tritonserver; \
	install $$triton/python_backend_stubs/$$version/triton_python_backend_stub $$triton/backends/python/
	test -x $(TRITON)/numpy1/bin/python || $(PYTHON) -m venv $(TRITON)/numpy1
	$(TRITON)/numpy1/bin/pip install --quiet --no-deps numpy==1.26.4
	echo "import site; site.addsitedir('$$($(TRITON)/bin/python -c 'import site; print(site.getsitepackages()[0])')')" \
		> $$($(TRITON)/numpy1/bin/python -c 'import site; print(site.getsitepackages()[0])')/rest.pth
	touch $@

# Two Ray nodes on this machine, a few minutes; Ray is heavy, and lives in an environment of its own.
RAY := .ray-venv
test-ray: install $(RAY)/.ready
	HIMAP_RAY_PYTHON=$(CURDIR)/$(RAY)/bin/python $(BIN)/pytest tests/serve/test_ray.py -m slow

$(RAY)/.ready: pyproject.toml constraints.txt tests/serve/ray-constraints.txt
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet --constraint constraints.txt --constraint tests/serve/ray-constraints.txt --editable '.[onnxruntime,ray]'
	touch $@

# Twenty minutes of bad input at every command's doors; HIMAP_FUZZ_SEED repeats an order.
fuzz: install
	HIMAP_FUZZ_SECONDS=$${HIMAP_FUZZ_SECONDS:-1200} $(BIN)/pytest tests/fuzz/test_long.py -m slow -s -k all_bad

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p himap_export & checked=$$!; \
	(cd .types/rooms && $(CURDIR)/$(BIN)/lint-imports --no-logo --config $(CURDIR)/pyproject.toml); kept=$$?; \
	wait $$checked && exit $$kept

# Neither mypy nor import-linter sees setuptools' package-dir mapping: show them the same tree by links; import-linter the
# rooms alone, as it takes no package whose parent is one.
.PHONY: types
types:
	mkdir -p .types/himap_export .types/rooms/himap_export
	for tree in .types .types/rooms; do for room in graphs engines serve exporter validate; do \
		ln -sfn $(CURDIR)/$$room $$tree/himap_export/$$room; done; done
	ln -sfn $(CURDIR)/himap_export/__init__.py .types/himap_export/__init__.py

# The documentation as a site: build/site/index.html.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "documentation: build/site/index.html"

bench: install
	$(BIN)/python benchmarks/prefill.py

# A second question about the same two pictures, asked anew and in a conversation; 3 GB of disk, docs/benchmarks.md.
bench-chat: install
	$(BIN)/python benchmarks/chat.py

# LLaVA-7B in 16 bits, exported: time and memory by phase.
bench-export: install
	$(BIN)/python benchmarks/real_size.py

# LLaVA-7B in int4, answering; 35 GB of disk, 18 GB of memory, an hour on 2 cores with three rounds.
bench-7b: install peers-env
	$(BIN)/python benchmarks/real_size_answers.py

# Half an hour on 2 quiet cores: 1 to 8 pictures in a prompt, and films; docs/benchmarks.md.
bench-many: install
	$(BIN)/python benchmarks/many_pictures.py

bench-gpu: install
	$(BIN)/python benchmarks/gpu.py

# Every alias at real size, without weights, for TensorRT-RTX; needs no GPU.
bench-engines: install
	$(BIN)/python benchmarks/engines_only.py --docs docs/models.md

# Gigabytes of memory and disk, minutes: weights of 7B in 8 and 4 bits, drawn at random.
bench-quantised: install
	$(BIN)/python benchmarks/quantised_engines.py

bench-analysis: install
	$(BIN)/python benchmarks/analysis_at_size.py

# An hour on 2 quiet cores, most of it llama.cpp's and onnxruntime-genai's; docs/benchmarks.md.
bench-peers: install peers-env
	$(BIN)/python benchmarks/peers.py --work build/peers --plot build/peers/peers.png

# Half an hour on 2 quiet cores: the real server under load, pruned beside unpruned; docs/benchmarks.md.
bench-serve: install
	$(BIN)/python benchmarks/serve.py --simulate --work build/serve --plot build/serve

# 10,000 requests, good and bad, and what must hold of each of them.
soak-serve: install
	$(BIN)/python benchmarks/serve_soak.py

# The peers live in an environment of their own; of llama.cpp only its benchmark and quantiser are built, for this CPU.
PEERS := .peers-venv
# Its AMX kernels for Q4_0 and Q8_0 end in a segmentation fault; AVX-512 and VNNI stay on.
LLAMA_FLAGS := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
LLAMA := $(PEERS)/src/llama_cpp_python-0.3.36
peers-env: $(PEERS)/.ready

$(PEERS)/.ready: benchmarks/peers-requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --requirement $<
	$(PEERS)/bin/python -c 'import torchvision' 2> /dev/null || $(PEERS)/bin/pip uninstall --quiet --yes torchvision
	$(PEERS)/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(PEERS)/src llama-cpp-python==0.3.36
	tar xzf $(LLAMA).tar.gz --directory $(PEERS)/src
	PATH=$(CURDIR)/$(PEERS)/bin:$$PATH nice -n 10 sh -c 'cmake -G Ninja -S $(LLAMA)/vendor/llama.cpp -B $(LLAMA)/build \
		-DCMAKE_C_FLAGS="$(LLAMA_FLAGS)" -DCMAKE_CXX_FLAGS="$(LLAMA_FLAGS)" \
		-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF > $(PEERS)/llama.log 2>&1 && \
		cmake --build $(LLAMA)/build --target llama-bench llama-quantize -j 2 >> $(PEERS)/llama.log 2>&1'
	cp $(LLAMA)/build/bin/llama-bench $(LLAMA)/build/bin/llama-quantize $(PEERS)/bin/
	touch $@

# Half an hour on 2 cores: policies, budgets and controls on 6,000 held-out questions; an interrupted one goes on.
study: install
	$(BIN)/python examples/shapes/study.py --out study --docs docs/study
	$(BIN)/python examples/shapes/study.py --positions renumbered --out study --docs docs/study

study-cuts: install
	$(BIN)/python examples/shapes/cuts.py --out study --docs docs/study

study-quantised: install
	$(BIN)/python examples/shapes/quantised.py --out study --docs docs/study

shapes: install
	$(BIN)/python examples/shapes/train.py --compile --out build/shapes-trained

clean:
	rm -rf $(VENV) .types demo build *.egg-info
