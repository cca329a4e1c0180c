package pod

import (
	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
)

// The leaves fit the seams.
var _ = Deps{
	Containers: KeeperContainers((*ctr.Client)(nil)),
	Network:    (*netslirp.Network)(nil),
	Images:     (*images.Store)(nil),
	Cgroups:    (*cgroupv2.Tree)(nil),
}
