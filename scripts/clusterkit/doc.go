// Command clusterkit does for scripts/cluster what a shell cannot do well: it issues the certificates of a cluster and
// the kubeconfigs that use them (pki), publishes ports of the node on the host (publish) and those of its services as
// they come and go (nodeports), packs a static program as an image (image), and removes a tree with files of
// subordinate ids (remove).
//
// Nouns: authority (signs certificates), identity (who a certificate says that its holder is), publisher (one port of
// the host for each node port). Each command owns the files that it writes; the ports belong to RootlessKit's parent
// and end with the node.
package main
