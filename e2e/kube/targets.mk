# Kubernetes: part of the Makefile at the top, which includes it.

# The programs are built in a folder of their own; all but CoreDNS are links to one.
KUBE := $(CACHE)/kube

.PHONY: kube clusterkit

kube: $(KUBE)/kube $(KUBE)/coredns clusterkit ## build Kubernetes and CoreDNS from their Go modules, once: for scripts/kubelet and scripts/cluster

clusterkit:
	@mkdir -p $(KUBE) $(GOTMPDIR)
	@$(GO) build -trimpath -o $(KUBE)/clusterkit ./scripts/clusterkit

KUBE_VERSION = $(shell awk '$$1 == "k8s.io/kubernetes" { print $$2 }' e2e/kube/go.mod)
KUBE_PARTS   = $(subst ., ,$(KUBE_VERSION:v%=%))
KUBE_STAMP   = $(foreach package,k8s.io/component-base/version k8s.io/client-go/pkg/version,-X $(package).gitVersion=$(KUBE_VERSION) \
	-X $(package).gitMajor=$(word 1,$(KUBE_PARTS)) -X $(package).gitMinor=$(word 2,$(KUBE_PARTS)))

$(KUBE)/kube: e2e/kube/go.mod e2e/kube/go.sum e2e/kube/kube/main.go
	@mkdir -p $(KUBE) $(GOTMPDIR)
	@echo "building Kubernetes $(KUBE_VERSION) and etcd: this takes some minutes, once" >&2
	@cd e2e/kube && $(GO) build -trimpath -ldflags "-s -w $(KUBE_STAMP)" -o $(CURDIR)/$@ ./kube
	@for program in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do ln -sf kube $(KUBE)/$$program; done
	@touch $@

# Linked against glibc's static library, for an image that holds nothing else; it resolves names by Go's own resolver.
$(KUBE)/coredns: e2e/kube/go.mod e2e/kube/go.sum e2e/kube/coredns/main.go
	@mkdir -p $(KUBE) $(GOTMPDIR)
	@echo "building CoreDNS" >&2
	@cd e2e/kube && $(GO) build -trimpath -ldflags "-s -w -linkmode external -extldflags -static" -o $(CURDIR)/$@ ./coredns
	@touch $@
