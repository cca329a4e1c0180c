# Faults: part of the Makefile at the top, which includes it.

# The daemon that has crash points (package e2e/crash), with a keeper beside it.
FAULTS := $(CACHE)/faults

.PHONY: build-faults faults faults-here faults-short

build-faults: build $(CRICTL)
	@mkdir -p $(FAULTS)
	@$(GO) build -trimpath -tags "$(LEAN) faults" -ldflags "$(LDFLAGS)" -o $(FAULTS)/coracle ./cmd/coracle
	@cp -f bin/coracle-keeper $(FAULTS)/coracle-keeper

INFAULTS = CORACLE_E2E=$(CURDIR)/bin CORACLE_E2E_CRICTL=$(CURDIR)/$(CRICTL) CORACLE_E2E_POINTS=$(CURDIR)/$(FAULTS) $(GO) test -v -count=1

faults: ## what happens when things break, at length, as an ordinary user; RUN=TestName for some
	@scripts/setup.sh --demo
	@scripts/as-user.sh make faults-here RUN='$(RUN)'

# Some tests of other packages have a long form, too.
LONG := ^(TestDamagedFiles|TestDamagedState|TestRestartsUnderLoad)$$

faults-here: export CORACLE_E2E_FAULTS := 1
faults-here: build-faults
	@$(INFAULTS) -timeout 60m -run '$(RUN)' ./e2e/faults
	@$(if $(filter .,$(RUN)),$(GO) test -v -count=1 -tags "$(LEAN) $(KEEPER)" -timeout 30m -run '$(LONG)' ./netslirp)
	@$(if $(filter .,$(RUN)),$(MAKE) e2e RUN='$(LONG)')

# The same in short, which is part of `make test`.
faults-short: build-faults
	@$(INFAULTS) -timeout 10m -short -run '$(RUN)' ./e2e/faults
