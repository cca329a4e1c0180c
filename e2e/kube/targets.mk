# Kubernetes: part of the Makefile at the top, which includes it.

# The programs are built in a folder of their own; all but CoreDNS are links to one.
KUBE := $(CACHE)/kube

# What is short enough for CI: the cluster comes up, and the ways through all of it. It takes some two minutes when the
# programs are built.
KUBE_CI := ^(TestNode|TestSecretsAreTheUsers|TestStaticPod|TestDeployment|TestExec|TestPortForward|TestVolumes|TestRestarts)

.PHONY: kube clusterkit e2e-kube e2e-kube-ci e2e-kube-here kube-vm kube-vm-here

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

e2e-kube-ci: ## a part of e2e-kube that is short enough for CI
	@$(MAKE) e2e-kube RUN='$(KUBE_CI)'

e2e-kube-here: build kube $(CRICTL)
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(HEALTH) ./e2e/cluster/health
	@CORACLE_E2E_KUBE=$(CURDIR)/$(KUBE) CORACLE_E2E_CRICTL=$(CURDIR)/$(CRICTL) $(GO) test -v -count=1 -timeout 40m -parallel 4 -run '$(RUN)' ./e2e/cluster

# The rootful runtime that a node's cgroups are compared with, for the VM.
ROOTFUL := $(CACHE)/rootful

$(ROOTFUL)/runc: e2e/rootful/go.mod e2e/rootful/go.sum
	@mkdir -p $(ROOTFUL) $(GOTMPDIR)
	@echo "building containerd and runc: this takes a minute, once" >&2
	@cd e2e/rootful && programs=$$($(GO) list -f '{{.ImportPath}}' tool) && for program in $$programs; do \
		CGO_ENABLED=1 $(GO) build -trimpath -tags "seccomp no_btrfs no_zfs no_devmapper" -ldflags "-s -w" -o $(CURDIR)/$(ROOTFUL)/ $$program || exit 1; done
	@touch $@

# The tests of the cluster that ask for controllers: limits, OOM kills, in-place resize, quality of service.
KUBEVMTESTS := ^(TestLimit[A-Z]|TestResize|TestQOS)

kube-vm: ## a cluster in the VM, where the kubelet has every controller: limits, OOM kills, resize, and its cgroups compared with a rootful kubelet's
	@scripts/setup.sh --vm
	@scripts/setup.sh --kube
	@scripts/as-user.sh make kube-vm-here RUN='$(RUN)'

# Kubernetes' programs without CoreDNS, and everything where scripts/cluster looks for it.
kube-vm-here: build kube $(CRICTL) $(ROOTFUL)/runc
	@rm -rf $(CACHE)/vm/kube && mkdir -p $(CACHE)/vm/kube $(CACHE)/vm/e2e/cluster
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(HEALTH) ./e2e/cluster/health
	@cd $(KUBE) && cp -a --link kube clusterkit health etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl ../vm/kube/
	@$(GO) test -c -o $(CACHE)/vm/e2e/cluster/cluster.test ./e2e/cluster
	@CORACLE_VM_MEMORY=$${CORACLE_VM_MEMORY:-4096} scripts/vm.sh --with bin --with scripts --with $(CRICTL) --with $(CACHE)/vm/kube --with $(CACHE)/vm/e2e \
		--with $(ROOTFUL) --log $(CACHE)/vm/log-kube --timeout 3600 --env CORACLE_E2E_VM=full --env CORACLE_E2E_KUBE=/payload/kube \
		--env CORACLE_E2E_CRICTL=/payload/crictl --env CORACLE_E2E_ROOTFUL=/payload/rootful \
		-- sh -c 'cd /payload/e2e/cluster && exec ./cluster.test -test.v -test.timeout 60m -test.run "$$0"' '$(if $(filter .,$(RUN)),$(KUBEVMTESTS),$(RUN))'
