package main

import (
	"crypto/ecdsa"
	"encoding/json"
)

// kubeconfig is the part of a client's configuration that is used here (clientcmd/v1), written as JSON, which is YAML.
type kubeconfig struct {
	APIVersion     string         `json:"apiVersion"`
	Kind           string         `json:"kind"`
	Clusters       []namedCluster `json:"clusters"`
	Users          []namedUser    `json:"users"`
	Contexts       []namedContext `json:"contexts"`
	CurrentContext string         `json:"current-context"`
}

type namedCluster struct {
	Name    string `json:"name"`
	Cluster struct {
		Server string `json:"server"`
		CA     []byte `json:"certificate-authority-data"`
	} `json:"cluster"`
}

type namedUser struct {
	Name string `json:"name"`
	User struct {
		Certificate []byte `json:"client-certificate-data"`
		Key         []byte `json:"client-key-data"`
	} `json:"user"`
}

type namedContext struct {
	Name    string `json:"name"`
	Context struct {
		Cluster string `json:"cluster"`
		User    string `json:"user"`
	} `json:"context"`
}

func writeKubeconfig(path string, id identity, ca, der []byte, key *ecdsa.PrivateKey) error {
	secret, err := keyPEM(key)
	if err != nil {
		return err
	}
	var (
		cluster namedCluster
		user    namedUser
		context namedContext
	)
	cluster.Name, user.Name, context.Name = "coracle", id.user, "coracle"
	cluster.Cluster.Server, cluster.Cluster.CA = id.server, certificatePEM(ca)
	user.User.Certificate, user.User.Key = certificatePEM(der), secret
	context.Context.Cluster, context.Context.User = cluster.Name, user.Name
	raw, err := json.MarshalIndent(kubeconfig{APIVersion: "v1", Kind: "Config", CurrentContext: context.Name,
		Clusters: []namedCluster{cluster}, Users: []namedUser{user}, Contexts: []namedContext{context}}, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(path, append(raw, '\n'))
}
