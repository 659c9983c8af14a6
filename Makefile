# Lightcone. `make serve` is all that a fresh machine needs; `make help` lists the rest.
#
#   DATA_DIR  where downloads, the embedded store and the key files live (.lightcone)
#   PORT      port of the HTTP server on 127.0.0.1 (8080)
#   ARGS      further arguments of `lightcone serve`

DATA_DIR ?= .lightcone
PORT ?=
ARGS ?=
export DATA_DIR PORT

.DEFAULT_GOAL := help
.PHONY: help serve fetch build test test-sdk lint bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: ## Fetch what is missing, build, and run the all-in-one node (Ctrl-C stops it)
	@exec scripts/serve.sh $(ARGS)

fetch: ## Fetch the pinned ONNX Runtime, Valkey and model into DATA_DIR
	@exec scripts/fetch.sh

build: ## Build target/release/lightcone
	@exec cargo build --release --locked

test: ## Run every test, the client libraries' included
	@exec scripts/test.sh

test-sdk: ## Run many client libraries and agent frameworks, each from its own environment, against one node
	@exec scripts/test-sdk.sh $(ARGS)

lint: ## Formatting, clippy with warnings denied, house rules of the tree
	@exec scripts/lint.sh

bench: ## Compare with llama-server, onnxruntime-genai and vLLM by hand, on an otherwise idle machine
	@exec load-tests/compare $(ARGS)

clean: ## Remove build outputs; DATA_DIR stays
	@exec cargo clean
