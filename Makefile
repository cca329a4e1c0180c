# coracle: `make help` explains the targets.

# The Go tool: the machine's own, or one that the script fetches (see scripts/go).
GO      ?= $(CURDIR)/scripts/go
PREFIX  ?= /usr/local
VERSION ?= $(or $(CORACLE_VERSION),$(shell scripts/version.sh))
# FUZZTIME is how long `make fuzz` spends on each target.
FUZZTIME ?= 60s
# BENCH is passed to the benchmark (e2e/bench).
BENCH   ?=
# RUN narrows test-unit, e2e and fuzz to the tests whose name matches: make e2e RUN=TestCrictlWalk
RUN     ?= .

# RootlessKit's other network stacks stay out of the program: a third of its size and of each process's memory.
LEAN := no_gvisortapvsock no_vpnkit no_lxcusernic
# libcontainer with seccomp, by libseccomp; without checkpoint and restore, which the kernel does not grant here.
KEEPER := seccomp runc_nocriu
# The keeper that ships is linked statically, where that can be, and without the C library's resolver.
SHIPPED = -trimpath -tags "$(KEEPER) netgo osusergo"

# The modes of the test VM (scripts/vm.sh), and the end-to-end tests that ask for what it has.
MODES   ?= full memory plain service
VMTESTS := ^(TestDelegation|TestDetach|TestLimit[A-Z]|TestOOM)
# What of them CI has the time for, in one mode.
CITESTS := ^(TestDelegation|TestDetach|TestLimitCPU|TestOOM)
# VMTIME is how long the tests of one mode may take: less than scripts/vm.sh gives the machine, so that Go tells where they hang.
VMTIME  ?= 45m

# What every run in the VM takes along.
INVM     = --with bin --with $(CRICTL) --with $(CACHE)/vm/e2e.test --env CORACLE_E2E=/payload/bin --env CORACLE_E2E_CRICTL=/payload/crictl
# FOCUS narrows critest-vm to the specs whose name matches: make critest-vm FOCUS=OOM
FOCUS   ?=

# The packages with fuzz targets.
FUZZED  := ./pod ./images ./netslirp ./cgroupv2 ./cmd/coracle
COVERED  = $(shell $(GO) list ./... | grep -v -x 'github.com/coracle-cri/coracle/e2e')
CACHE   := .cache
CRICTL  := $(CACHE)/bin/crictl
# critest, what it runs specs in parallel with, and what its images are made of; and where it leaves its report
CRITEST := $(CACHE)/bin/critest
GINKGO  := $(CACHE)/bin/ginkgo
GUEST   := $(CACHE)/bin/guest
# what tries to get out of containers
HOSTILE := $(CACHE)/bin/hostile
REPORT  := $(CACHE)/critest/report
# RACE=1 runs critest on programs with Go's race detector: make critest RACE=1
RACE    ?=
# Programs of another version, for the tests that swap them in, and a keeper whose state is of another kind.
NEXT    := $(CACHE)/next
LINTER  := $(CACHE)/bin/golangci-lint-2.15.0
VULN    := $(CACHE)/bin/govulncheck-1.9.0
LDFLAGS := -X main.version=$(VERSION)

# Test programs are built and run below .cache, where an AppArmor profile can name them (scripts/setup.sh).
export GOTMPDIR := $(CURDIR)/$(CACHE)/tmp
export GOFLAGS  := -buildvcs=false
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help build build-next build-race install demo demo-here test test-here test-unit lint vuln race race-here e2e e2e-vm e2e-vm-here e2e-vm-ci critest-vm critest-vm-here critest critest-here fuzz fuzz-here \
	bench bench-here fmt clean

help: ## list the targets
	@echo "coracle $(VERSION), a rootless CRI runtime"
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/coracle and bin/coracle-keeper
	@mkdir -p bin $(GOTMPDIR)
	@$(GO) build -trimpath -tags "$(LEAN)" -ldflags "$(LDFLAGS)" -o bin/coracle ./cmd/coracle
	@CGO_ENABLED=1 $(GO) build $(SHIPPED) -ldflags "$(LDFLAGS) $$(scripts/static.sh)" -o bin/coracle-keeper ./cmd/coracle-keeper

install: build ## install both programs into $(PREFIX)/bin (PREFIX=~/.local needs no root)
	install -D -m 0755 bin/coracle $(DESTDIR)$(PREFIX)/bin/coracle
	install -D -m 0755 bin/coracle-keeper $(DESTDIR)$(PREFIX)/bin/coracle-keeper

demo: ## install what is missing, start a node, run a pod on it through crictl, clean up
	@scripts/setup.sh --demo
	@scripts/as-user.sh make demo-here

demo-here: build $(CRICTL)
	@scripts/demo.sh

test: ## install what is missing, then run every test as an ordinary user
	@scripts/setup.sh --test
	@scripts/as-user.sh make test-here

# Every test, as the calling user, on a machine that is set up: a program that set-up installs and that is missing is a
# failure. What is skipped says what this machine's kernel, or its user, has not.
test-here: export CORACLE_TEST_WHOLE := 1
test-here: build test-unit e2e faults-short critest-here

test-unit: ## unit and kernel tests, as the calling user (not root)
	@mkdir -p $(GOTMPDIR)
	@$(GO) test -tags "$(LEAN) $(KEEPER)" -run '$(RUN)' -timeout 15m $(COVERED)

lint: $(LINTER) ## go vet and golangci-lint, at a pinned version
	@mkdir -p $(GOTMPDIR)
	@$(GO) vet -tags "$(LEAN) $(KEEPER)" ./...
	@PATH="$$($(GO) env GOROOT)/bin:$$PATH" $(LINTER) run --build-tags "$(LEAN) $(KEEPER)" ./...

vuln: $(VULN) ## known vulnerabilities in what coracle calls, by govulncheck at a pinned version; of vuln.go.dev, or of its Go module
	@scripts/vuln.sh $(CURDIR)/$(VULN) "$(LEAN) $(KEEPER)"

race: ## unit and end-to-end tests, and the short faults, with Go's race detector, as an ordinary user; RUN=TestName for some
	@scripts/setup.sh --test
	@scripts/as-user.sh make race-here RUN='$(RUN)'

# A report of the programs' own is in a node's log, where the end-to-end tests look for it.
race-here: build-race $(CRICTL) $(HOSTILE)
	@CGO_ENABLED=1 $(GO) test -race -tags "$(LEAN) $(KEEPER)" -run '$(RUN)' -timeout 30m $(COVERED)
	$(call next,$(CACHE)/race/next,-race,-race -trimpath -tags "$(KEEPER)",)
	@CORACLE_E2E_NEXT=$(CURDIR)/$(CACHE)/race/next CORACLE_E2E_HOSTILE=$(CURDIR)/$(HOSTILE) $(RACED) -run '$(RUN)' ./e2e
	@mkdir -p $(CACHE)/race/faults
	@CGO_ENABLED=1 $(GO) build -race -trimpath -tags "$(LEAN) faults" -ldflags "$(LDFLAGS)" -o $(CACHE)/race/faults/coracle ./cmd/coracle
	@ln -f $(CACHE)/race/coracle-keeper $(CACHE)/race/faults/coracle-keeper
	@CORACLE_E2E_POINTS=$(CURDIR)/$(CACHE)/race/faults $(RACED) -short -run '$(RUN)' ./e2e/faults

RACED = CORACLE_E2E=$(CURDIR)/$(CACHE)/race CORACLE_E2E_CRICTL=$(CURDIR)/$(CRICTL) CGO_ENABLED=1 $(GO) test -race -v -count=1 -timeout 60m

# $(call next,DIR,FLAGS,KEEPERFLAGS,LINKERFLAGS) builds programs of another version, and a keeper whose state is of another
# kind. The programs of the race detector need cgo.
define next
	@mkdir -p $(1)/alien
	@$(if $(2),CGO_ENABLED=1) $(GO) build $(2) -trimpath -tags "$(LEAN)" -ldflags "-X main.version=$(VERSION)-next" -o $(1)/coracle ./cmd/coracle
	@CGO_ENABLED=1 $(GO) build $(3) -ldflags "-X main.version=$(VERSION)-next $(4)" -o $(1)/coracle-keeper ./cmd/coracle-keeper
	@CGO_ENABLED=1 $(GO) build -trimpath -tags "$(KEEPER)" -o $(1)/alien/coracle-keeper \
		-ldflags "-X main.version=$(VERSION)-alien -X github.com/coracle-cri/coracle/ctr/keeper.handoverFormat=1000" ./cmd/coracle-keeper
	@ln -f $(1)/coracle $(1)/alien/coracle
endef

build-next: build
	$(call next,$(NEXT),,$(SHIPPED),$$(scripts/static.sh))

e2e: build-next $(CRICTL) $(HOSTILE) ## end-to-end tests, as the calling user (not root); RUN=TestName for some
	@CORACLE_E2E=$(CURDIR)/bin CORACLE_E2E_CRICTL=$(CURDIR)/$(CRICTL) CORACLE_E2E_HOSTILE=$(CURDIR)/$(HOSTILE) CORACLE_E2E_NEXT=$(CURDIR)/$(NEXT) \
		$(GO) test -v -count=1 -timeout 60m -run '$(RUN)' ./e2e

e2e-vm: ## the tests of limits and delegation in a VM that has all of cgroup v2, in each of its modes; MODES="full memory"
	@scripts/setup.sh --vm
	@scripts/as-user.sh make e2e-vm-here RUN='$(RUN)' MODES='$(MODES)' VMTIME=$(VMTIME)

e2e-vm-ci: ## a part of e2e-vm that is short enough for CI: delegation, a cpu limit and OOM kills, where every controller is delegated
	@$(MAKE) e2e-vm MODES=full RUN='$(CITESTS)' VMTIME=8m

# Every test binary is built here: the VM has no compiler, and computes 14 times slower where it is emulated.
e2e-vm-here: build $(CRICTL)
	@mkdir -p $(CACHE)/vm
	@$(GO) test -c -o $(CACHE)/vm/e2e.test ./e2e
	@for mode in $(MODES); do \
		echo "== $$mode"; \
		scripts/vm.sh --mode $$mode $(INVM) --log $(CACHE)/vm/log-$$mode --env CORACLE_E2E_VM=$$mode \
			-- /payload/e2e.test -test.v -test.timeout $(VMTIME) -test.run '$(if $(filter .,$(RUN)),$(VMTESTS),$(RUN))' || exit 1; \
	done

critest-vm: ## critest in the VM, where its spec on OOM kills runs too; FOCUS=OOM for some specs
	@scripts/setup.sh --vm
	@scripts/as-user.sh make critest-vm-here FOCUS='$(FOCUS)'

critest-vm-here: build $(CRICTL) $(CRITEST) $(GINKGO) $(GUEST)
	@mkdir -p $(CACHE)/vm
	@$(GO) test -c -o $(CACHE)/vm/e2e.test ./e2e
	@scripts/vm.sh $(INVM) --with $(CRITEST) --with $(GINKGO) --with $(GUEST) --log $(CACHE)/vm/log-critest --timeout 7000 --env CORACLE_E2E_VM=full \
		--env CORACLE_E2E_CRITEST=/payload --env CORACLE_E2E_CRITEST_REPORT=/var/log/vm --env CORACLE_E2E_CRITEST_FOCUS='$(FOCUS)' \
		-- /payload/e2e.test -test.v -test.timeout 120m -test.run '^TestCritest$$'

critest: ## critest 1.36 against a node, as an ordinary user; RACE=1 for the race detector
	@scripts/setup.sh --demo
	@scripts/as-user.sh make critest-here RACE=$(RACE)

# The last lines are the summary's, whatever else the test has to say.
critest-here: $(if $(RACE),build-race,build) $(CRICTL) $(CRITEST) $(GINKGO) $(GUEST)
	@rm -rf $(REPORT) && mkdir -p $(REPORT)
	@CORACLE_E2E=$(CURDIR)/$(if $(RACE),$(CACHE)/race,bin) CORACLE_E2E_CRICTL=$(CURDIR)/$(CRICTL) CORACLE_E2E_CRITEST_RACE=$(RACE) \
		CORACLE_E2E_CRITEST=$(CURDIR)/$(dir $(CRITEST)) CORACLE_E2E_CRITEST_REPORT=$(CURDIR)/$(REPORT) \
		$(GO) test -v -count=1 -timeout 60m -run '^TestCritest$$' ./e2e; \
		code=$$?; cat $(REPORT)/summary || code=1; exit $$code

# Both programs with Go's race detector.
build-race: build
	@mkdir -p $(CACHE)/race
	@CGO_ENABLED=1 $(GO) build -race -trimpath -tags "$(LEAN)" -ldflags "$(LDFLAGS)" -o $(CACHE)/race/coracle ./cmd/coracle
	@CGO_ENABLED=1 $(GO) build -race -trimpath -tags "$(KEEPER)" -ldflags "$(LDFLAGS)" -o $(CACHE)/race/coracle-keeper ./cmd/coracle-keeper

fuzz: ## fuzz every target for FUZZTIME each (a minute), as an ordinary user; RUN=FuzzName for some
	@scripts/setup.sh --demo
	@scripts/as-user.sh make fuzz-here RUN='$(RUN)' FUZZTIME=$(FUZZTIME)

# The go command takes one target of one package at a time. A package that cannot be built is a failure, and so is a run
# without a target.
fuzz-here:
	@mkdir -p $(GOTMPDIR)
	@ran=0; for package in $(FUZZED); do \
		targets=$$($(GO) test -tags "$(LEAN) $(KEEPER)" -list '^Fuzz' $$package) || { echo "$$targets"; exit 1; }; \
		for target in $$(echo "$$targets" | grep '^Fuzz' | grep -E '$(RUN)'); do \
			echo "== $$package $$target"; \
			$(GO) test -tags "$(LEAN) $(KEEPER)" -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$package || exit 1; \
			ran=$$((ran + 1)); \
		done; \
	done; \
	[ $$ran -gt 0 ] || { echo "no fuzz target of $(FUZZED) has a name with $(RUN)" >&2; exit 1; }

bench: ## measure coracle and rootless containerd in turn: table, figures and picture; some 10 minutes. BENCH="-quick", BENCH="-rows pull"
	@scripts/setup.sh --bench
	@scripts/as-user.sh make bench-here BENCH='$(BENCH)'

bench-here: build peer
	@mkdir -p $(CACHE)/bin
	@$(GO) build -trimpath -o $(CACHE)/bin/bench ./e2e/bench
	@$(CACHE)/bin/bench compare -programs bin -peer $(PEER) -out $(CACHE)/bench $(BENCH)

fmt: ## format the Go files
	@gofmt -s -w $$(find . -name '*.go' -not -path './.cache/*')

clean: ## remove what was built and fetched
	@[ ! -d $(CACHE) ] || chmod -R u+w $(CACHE)
	rm -rf bin $(CACHE)

$(CRICTL): e2e/tools/go.mod e2e/tools/go.sum
	@mkdir -p $(dir $@) $(GOTMPDIR)
	@echo "building crictl" >&2
	@cd e2e/tools && $(GO) build -trimpath -ldflags "-X sigs.k8s.io/cri-tools/pkg/version.Version=$$($(GO) list -m -f '{{.Version}}' sigs.k8s.io/cri-tools | sed s/^v//)" -o $(CURDIR)/$@ sigs.k8s.io/cri-tools/cmd/crictl

# critest is built from a copy of its module, in which e2e/repin has changed one digest.
$(CRITEST): e2e/tools/go.mod e2e/tools/go.sum go.mod e2e/fixture/critest.go e2e/repin/main.go
	@mkdir -p $(dir $@) $(GOTMPDIR)
	@echo "building critest" >&2
	@rm -rf $(CACHE)/critest/build && mkdir -p $(CACHE)/critest/build && cp e2e/tools/go.mod e2e/tools/go.sum $(CACHE)/critest/build/
	@cd e2e/tools && $(GO) mod download sigs.k8s.io/cri-tools && \
		cp -r --no-preserve=mode "$$($(GO) list -m -f '{{.Dir}}' sigs.k8s.io/cri-tools)" $(CURDIR)/$(CACHE)/critest/build/cri-tools
	@$(GO) run ./e2e/repin $(CACHE)/critest/build/cri-tools/pkg/validate/consts.go
	@$(GO) mod edit -replace sigs.k8s.io/cri-tools=$(CURDIR)/$(CACHE)/critest/build/cri-tools $(CACHE)/critest/build/go.mod
	@cd e2e/tools && $(GO) test -c -trimpath -modfile $(CURDIR)/$(CACHE)/critest/build/go.mod -ldflags "-X sigs.k8s.io/cri-tools/pkg/version.Version=$$($(GO) list -m -f '{{.Version}}' sigs.k8s.io/cri-tools | sed s/^v//)" -o $(CURDIR)/$@ sigs.k8s.io/cri-tools/cmd/critest

$(GINKGO): e2e/tools/go.mod e2e/tools/go.sum
	@mkdir -p $(dir $@) $(GOTMPDIR)
	@cd e2e/tools && $(GO) build -trimpath -o $(CURDIR)/$@ github.com/onsi/ginkgo/v2/ginkgo

$(GUEST): go.mod $(wildcard e2e/guest/*.go)
	@mkdir -p $(dir $@) $(GOTMPDIR)
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w" -o $@ ./e2e/guest

$(HOSTILE): go.mod $(wildcard e2e/hostile/*.go)
	@mkdir -p $(dir $@) $(GOTMPDIR)
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w" -o $@ ./e2e/hostile

$(LINTER):
	@mkdir -p $(dir $@) $(GOTMPDIR)
	@GOBIN=$(CURDIR)/$(dir $@) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
	@mv $(dir $@)golangci-lint $@

$(VULN):
	@mkdir -p $(dir $@) $(GOTMPDIR)
	@GOBIN=$(CURDIR)/$(dir $@) $(GO) install golang.org/x/vuln/cmd/govulncheck@v1.9.0
	@mv $(dir $@)govulncheck $@

include e2e/kube/targets.mk
include e2e/faults/targets.mk
include e2e/peer/targets.mk
