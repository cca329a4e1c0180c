# Kubernetes: part of the Makefile at the top, which includes it.

# The programs are built in a folder of their own; all but CoreDNS are links to one.
KUBE := $(CACHE)/kube

# What CI runs of the tests: the cluster comes up, and the ways through all of it. It takes some two minutes when the
# programs are built.
KUBE_CI := ^(TestNode|TestSecretsAreTheUsers|TestStaticPod|TestDeployment|TestExec|TestPortForward|TestVolumes|TestRestarts)

.PHONY: kube clusterkit e2e-kube e2e-kube-ci e2e-kube-here

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
	@began=$$(date +%s); (cd e2e/kube && $(GO) build -trimpath -ldflags "-s -w $(KUBE_STAMP)" -o $(CURDIR)/$@ ./kube) && \
		echo "Kubernetes and etcd are built, after $$(($$(date +%s) - began)) s" >&2
	@for program in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do ln -sf kube $(KUBE)/$$program; done
	@touch $@

# Linked against glibc's static library, for an image that holds nothing else; it resolves names by Go's own resolver,
# and what the linker warns of is not called.
$(KUBE)/coredns: e2e/kube/go.mod e2e/kube/go.sum e2e/kube/coredns/main.go
	@mkdir -p $(KUBE) $(GOTMPDIR)
	@echo "building CoreDNS" >&2
	@began=$$(date +%s); (cd e2e/kube && $(GO) build -trimpath -ldflags "-s -w -linkmode external -extldflags -static" -o $(CURDIR)/$@ ./coredns) && \
		echo "CoreDNS is built, after $$(($$(date +%s) - began)) s" >&2
	@touch $@

# HEALTH is in one of the images of the tests.
HEALTH := $(KUBE)/health

e2e-kube: ## build Kubernetes, start a cluster as an ordinary user and prove with kubectl that it works; RUN=TestName for some
	@scripts/setup.sh --kube
	@scripts/as-user.sh make e2e-kube-here RUN='$(RUN)'

e2e-kube-ci: ## the part of e2e-kube that CI runs
	@$(MAKE) e2e-kube RUN='$(KUBE_CI)'

e2e-kube-here: build kube $(CRICTL)
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(HEALTH) ./e2e/cluster/health
	@CORACLE_E2E_KUBE=$(CURDIR)/$(KUBE) CORACLE_E2E_CRICTL=$(CURDIR)/$(CRICTL) $(GO) test -v -count=1 -timeout 40m -parallel 4 -run '$(RUN)' ./e2e/cluster
