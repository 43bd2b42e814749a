# The only entry point for people and for CI. `make help` lists the targets.

CARGO ?= cargo
# Two of the proxy's unit tests enter a namespace, which takes a root: who is none is one in a namespace of its own.
AS_ROOT = $(if $(filter 0,$(shell id -u)),,unshare --user --map-root-user --mount --net sh -ec \
	'mount -t tmpfs tmpfs /run; ip link set lo up; exec "$$@"' sh)

.DEFAULT_GOAL := help
.PHONY: help build demo demo-kube interop test test-kube test-skew bench soak release check fmt lint tidy fuzz-smoke reference

help: ## This list.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

build: ## All programs, for development, in target/debug/.
	$(CARGO) build --workspace --locked

demo: build ## Two nodes and a small shop: what the mesh does, shown in under a minute. BREAK=rules|authz|tls|weights|mirror|retries|jwt|breaker|gateway|sni|fence, KEEP=1.
	@./.ci/tools.sh
	@if [ -n "$(BREAK)" ]; then $(CARGO) build -p ztunnel --locked --features sabotage --bin ztunnel-sabotage; fi
	@KEEP=$(KEEP) target/debug/lab demo $(if $(BREAK),--break $(BREAK))

demo-kube: build ## The same on a real cluster of two nodes on this machine, from install to uninstall; needs root. BREAK=weights, KEEP=1.
	@if [ -n "$(BREAK)" ]; then $(CARGO) build -p ztunnel --locked --features sabotage --bin ztunnel-sabotage; fi
	@KEEP=$(KEEP) target/debug/lab demo-kube $(if $(BREAK),--break $(BREAK))

interop: build ## Our proxies and the ztunnel that PEER_ZTUNNEL names in one mesh: both ways, both identities, policy.
	@./.ci/tools.sh
	target/debug/lab interop

test: ## Everything, root and rootless, with one summary. ONLY=<regex> chooses.
	@./.ci/test.sh

test-kube: ## What needs a real API server, which is built once. ONLY=<regex> chooses; results in target/test-kube.json.
	@./.ci/test-kube.sh

test-skew: ## This version and the one before it in one mesh: control, nodes and gateways of either. ONLY=<regex> chooses.
	@./.ci/tools.sh
	@./.ci/skew.sh

bench: ## Speed: direct, Tulle, the ztunnel that PEER_ZTUNNEL names, the Envoy of PEER_ENVOY=install|PATH. BENCH=--quick tries it.
	@$(MAKE) --no-print-directory release
	target/release/lab bench $(BENCH)

soak: ## Churn under load for MINUTES (30); memory, files and rules must not grow, no verdict may be wrong.
	@$(MAKE) --no-print-directory release
	target/release/lab soak --minutes $${MINUTES:-30}

release: ## All programs, optimised, in target/release/, and which commit they were built from.
	@./.ci/tools.sh
	$(CARGO) build --workspace --locked --release
	@cd target/release && { git describe --always --dirty --abbrev=10; sha256sum control lab ztunnel; } >built-from

check: ## Before a commit: lints, and all tests that make no namespaces.
	@$(MAKE) --no-print-directory lint
	$(CARGO) test --workspace --exclude ztunnel --locked --lib --bins
	$(CARGO) test -p ztunnel --locked --lib --bins --no-run
	$(AS_ROOT) $(CARGO) test -p ztunnel --locked --lib --bins
	$(CARGO) test --workspace --locked --test tidy --test reference --test malformed --test fuzz_smoke

fmt: ## Formats the code.
	$(CARGO) fmt --all

lint: ## Formatting and clippy; warnings are errors.
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

tidy: ## The shape of the tree: layers, headers, lengths, links.
	$(CARGO) test --workspace --locked --test tidy

fuzz-smoke: ## Every parser of foreign bytes, with many more cases than `make test` gives it.
	PROPTEST_CASES=$${PROPTEST_CASES:-20000} $(CARGO) test --workspace --locked --test fuzz_smoke

reference: ## Writes docs/reference.md from the code.
	UPDATE=1 $(CARGO) test --workspace --locked --test reference
