# The peer of the benchmark: part of the Makefile at the top, which includes it.

# Rootless containerd as its own module builds it, with RootlessKit, runc and the CNI plugins, at the versions of e2e/peer/go.mod.
PEER := $(CACHE)/peer
PEER_VERSION = $(shell awk '$$1 == "github.com/containerd/containerd/v2" { print $$2 }' e2e/peer/go.mod)
PEER_PLUGINS := main/bridge main/loopback ipam/host-local meta/portmap

.PHONY: peer

peer: $(PEER)/stamp ## build rootless containerd and what it needs from their Go modules, once: the peer of make bench

# Stripped and static where containerd's own Makefile builds so; without the snapshotters that no rootless user has.
$(PEER)/stamp: e2e/peer/go.mod e2e/peer/go.sum e2e/peer/targets.mk e2e/peer/nolimits/main.go
	@rm -rf $(PEER) && mkdir -p $(PEER)/cni $(GOTMPDIR)
	@echo "building containerd $(PEER_VERSION), RootlessKit, runc and CNI plugins: this takes some minutes, once" >&2
	@cd e2e/peer && $(GO) build -trimpath -tags "no_btrfs no_devmapper no_zfs urfave_cli_no_docs" -o $(CURDIR)/$(PEER)/ \
		-ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$(PEER_VERSION)" github.com/containerd/containerd/v2/cmd/containerd
	@cd e2e/peer && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -extldflags "-static"' -o $(CURDIR)/$(PEER)/ \
		github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2
	@cd e2e/peer && CGO_ENABLED=1 $(GO) build -trimpath -tags "seccomp urfave_cli_no_docs" -ldflags "-s -w" -o $(CURDIR)/$(PEER)/ github.com/opencontainers/runc
	@cd e2e/peer && $(GO) build -trimpath -ldflags "-s -w" -o $(CURDIR)/$(PEER)/ github.com/rootless-containers/rootlesskit/v3/cmd/rootlesskit
	@cd e2e/peer && CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w" -o $(CURDIR)/$(PEER)/cni/ \
		$(addprefix github.com/containernetworking/plugins/plugins/,$(PEER_PLUGINS))
	@cd e2e/peer && CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w" -o $(CURDIR)/$(PEER)/ ./nolimits
	@touch $@
