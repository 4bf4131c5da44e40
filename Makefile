# The front door. `make help` says what there is.
#
# Build output goes outside the clone, so that a fresh one builds in seconds where another was built before.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# Last: where rustup puts Rust, if .ci/deps had to install it.
export PATH := $(PATH):$(HOME)/.cargo/bin
export CARGO_TARGET_DIR ?= $(HOME)/.cache/evolute/target
# Colour codes and redrawn progress bars only where a person watches.
export CARGO_TERM_PROGRESS_WHEN ?= auto

OUT ?=
DURATION ?= 120
SEED ?= 1
FAULTS ?= all
QUICK ?=
RESULTS ?=
WORKS ?= randwrite-4k-qd1 randwrite-4k-qd32
RUN := $(CARGO_TARGET_DIR)/evolute-run
STEP := .ci/step
# Into the report of a run: the programs do not know their commit.
COMMIT = --commit '$(shell git describe --always --dirty 2>/dev/null || echo unknown)'
# Named, because make runs lines that name MAKE itself even under `make -n`.
SUBMAKE = $(MAKE) --no-print-directory
# Each Rust has lints of its own: those of the one we develop with stop a change, those of another are only told.
LINTED_WITH := $(shell sed -n 's/^rust-version = "\(.*\)"$$/\1/p' Cargo.toml)
DENY := $(if $(findstring rustc $(LINTED_WITH).,$(shell rustc --version 2>/dev/null)),-D warnings)
BINARIES := cargo build --release --workspace --bins
# The programs as they are installed and measured (docs/decisions/0006).
DIST := cargo build --profile dist --workspace $(foreach p,evolute evolute-chunkserver evolute-mds evolute-vhost,--bin $(p))
BENCH := cargo build --release --workspace --bin evolute-bench

.DEFAULT_GOAL := help
.PHONY: help demo test verify fix bench bench-report bench-profile bench-layers torture torture-short guest-tests images deps build mutants

help:
	@echo 'make demo         a guest boots on a three-replica volume, loses a chunkserver, keeps its data'
	@echo 'make test         everything: dependencies, images, verify, guest tests, a short torture'
	@echo 'make verify       only looks: format, clippy, tests, docs and their links, licences'
	@echo 'make fix          writes: format, and what clippy can mend by itself'
	@echo 'make guest-tests  real guests against a real cluster; TEST=NAME runs those whose name contains it'
	@echo 'make torture      breaks a real cluster and checks every answer; DURATION=seconds SEED=n FAULTS=list (needs root)'
	@echo 'make bench        Evolute and qemu-storage-daemon side by side; OUT=FILE JSON lines, QUICK=1 four minutes of thirty'
	@echo 'make bench-report tables and plots of docs/performance.md from RESULTS="FILE FILE", which the two beside it wrote as OUT'
	@echo 'make bench-profile  where each µs of a load goes, per process (needs root and perf); WORKS="NAME NAME" OUT=FILE'
	@echo 'make bench-layers   what each layer of a write costs, by leaving layers out (a quarter of an hour); OUT=FILE'
	@echo 'make mutants      breaks Evolute on purpose, in many ways, and wants each caught; M=NAME one of them'
	@echo 'make images       the kernel and the root file systems the guests boot'
	@echo 'make deps         installs missing Debian packages, and Rust if there is none (says which and why; needs root or sudo)'
	@echo 'make build        the programs as they are installed, into $(CARGO_TARGET_DIR)/dist'

deps:
	@.ci/deps

# The dependencies first: without RocksDB's header the build fails in bindgen, in words that name no package.
build: deps
	@$(DIST)

images: deps
	@$(SUBMAKE) -C images

demo:
	@mkdir -p $(RUN); rm -f $(RUN)/steps
	@export EVOLUTE_STEPS=$(RUN)/steps; \
	 $(STEP) 'Debian packages' .ci/deps; \
	 $(STEP) 'guest images' $(SUBMAKE) -C images; \
	 $(STEP) 'programs' $(BINARIES); \
	 $(STEP) 'demo' $(CARGO_TARGET_DIR)/release/demo; \
	 printf '\nTime of each step:\n'; cat $(RUN)/steps

test:
	@mkdir -p $(RUN); rm -f $(RUN)/steps $(RUN)/tests; touch $(RUN)/tests
	@export EVOLUTE_STEPS=$(RUN)/steps EVOLUTE_TESTS=$(RUN)/tests; status=0; \
	 $(STEP) 'Debian packages' .ci/deps; \
	 $(STEP) 'guest images' $(SUBMAKE) -C images; \
	 $(SUBMAKE) verify || status=1; \
	 $(SUBMAKE) guest-tests || status=1; \
	 if [ "$$(id -u)" -eq 0 ]; then $(SUBMAKE) torture-short || status=1; \
	 else printf '\n==> torture: NOT run, it makes network namespaces and mounts, which needs root\n'; fi; \
	 printf '\nTime of each step:\n'; cat $(RUN)/steps; \
	 .ci/count-tests $(RUN)/tests || status=1; \
	 if [ $$status -ne 0 ]; then echo 'make test: something above failed'; fi; \
	 exit $$status

# Never writes to the work tree. Looks at everything before it says no, so that one run shows all there is to mend.
verify:
	@status=0; \
	 $(STEP) 'format' cargo fmt --all --check || status=1; \
	 $(STEP) 'clippy' cargo clippy --release --workspace --all-targets -- $(DENY) || status=1; \
	 $(STEP) 'programs' $(BINARIES) || status=1; \
	 $(STEP) 'tests' .ci/cargo-test --workspace --exclude evolute-guest-tests || status=1; \
	 RUSTDOCFLAGS='$(DENY)' $(STEP) 'documentation' \
	   cargo doc --release --workspace --no-deps --document-private-items --quiet || status=1; \
	 if command -v cargo-deny >/dev/null; then \
	   $(STEP) 'licences and advisories' cargo deny --workspace check || status=1; \
	 else \
	   printf '\n==> licences and advisories: NOT checked, cargo-deny is not installed (cargo install cargo-deny)\n'; \
	 fi; \
	 exit $$status

fix:
	cargo clippy --release --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all

guest-tests:
	@$(STEP) 'programs for the guest tests' $(BINARIES)
	@$(STEP) 'guest tests' .ci/cargo-test -p evolute-guest-tests $(TEST) -- --test-threads=1

bench: deps
	@$(STEP) 'programs' $(DIST)
	@$(STEP) 'load generator' $(BENCH)
	@$(CARGO_TARGET_DIR)/release/evolute-bench --bin-dir $(CARGO_TARGET_DIR)/dist $(if $(QUICK),--quick) $(COMMIT) $(if $(OUT),--out $(OUT))

bench-report:
	@if [ -z '$(RESULTS)' ]; then echo 'make bench-report: say RESULTS=FILE, what make bench wrote with OUT=FILE' >&2; exit 2; fi
	@$(STEP) 'load generator' $(BENCH)
	@$(CARGO_TARGET_DIR)/release/evolute-bench report $(RESULTS)

bench-profile: deps
	@$(STEP) 'programs' $(DIST)
	@$(STEP) 'load generator' $(BENCH)
	@$(CARGO_TARGET_DIR)/release/evolute-bench profile --bin-dir $(CARGO_TARGET_DIR)/dist $(WORKS:%=--work %) $(if $(OUT),--out $(OUT))

bench-layers: deps
	@bench/layers/measure $(OUT)

mutants:
	@.ci/mutants $(M)

torture: deps
	@$(STEP) 'programs' $(BINARIES)
	@$(STEP) 'torture' $(CARGO_TARGET_DIR)/release/torture --duration $(DURATION) --until-covered 300 --seed $(SEED) --faults $(FAULTS) $(COMMIT) $(if $(OUT),--json $(OUT))

# Every fault at least once with something at stake; the same seed every time. Four minutes, seven at most.
torture-short:
	@$(STEP) 'torture, two minutes' $(CARGO_TARGET_DIR)/release/torture --duration 75 --seed 42 --every-ms 2500 --rate 400 --until-covered 240 --window-acks 100 --faults $(FAULTS) $(COMMIT)
