// Package cluster tests coracle under a real Kubernetes: scripts/cluster starts etcd, the control plane, a kubelet and
// kube-proxy of the release that e2e/kube pins, and the tests talk to them from the host with that release's kubectl.
//
// Nouns: cluster (one for all tests, as TestMain starts it), space (a namespace that one test has for itself). The
// cluster's directories, its registry and everything that runs are TestMain's, which fails where something is left.
//
// The tests run when CORACLE_E2E_KUBE names the directory of Kubernetes' programs, as `make e2e-kube` does; without it
// they are skipped.
package cluster
