package images

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/cpu"
)

// variants lists the variants of this machine's architecture that it can run, the best first. "" is a manifest
// without a variant, which is how nearly all are published.
func variants() []string {
	switch runtime.GOARCH {
	case "amd64":
		// Levels of the x86-64 psABI. A manifest for a level that the CPU lacks dies of SIGILL.
		out := []string{"", "v1"}
		x := cpu.X86
		if x.HasSSE3 && x.HasSSSE3 && x.HasSSE41 && x.HasSSE42 && x.HasPOPCNT {
			out = append([]string{"v2"}, out...)
			if x.HasAVX && x.HasAVX2 && x.HasBMI1 && x.HasBMI2 && x.HasFMA {
				out = append([]string{"v3"}, out...)
			}
		}
		return out
	case "arm64":
		return []string{"v8", "", "v8.0"}
	}
	return []string{""}
}

// choosePlatform finds the manifest for this machine in an index. An entry without a platform is taken where it
// is the only one: some tools wrap a single image so.
func choosePlatform(entries []v1.Descriptor) (v1.Descriptor, error) {
	var have []string
	best, bestRank := v1.Descriptor{}, -1
	order := variants()
	for _, d := range entries {
		if d.Annotations["vnd.docker.reference.type"] != "" {
			continue // an attestation about another entry
		}
		if d.Platform == nil {
			if len(entries) == 1 {
				return d, nil
			}
			continue
		}
		have = append(have, d.Platform.String())
		if d.Platform.OS != "linux" || d.Platform.Architecture != runtime.GOARCH {
			continue
		}
		rank := slices.Index(order, d.Platform.Variant)
		if rank >= 0 && (bestRank < 0 || rank < bestRank) {
			best, bestRank = d, rank
		}
	}
	if bestRank < 0 {
		return v1.Descriptor{}, fmt.Errorf("%w: there is no image for linux/%s, only for: %s", ErrNotFound, runtime.GOARCH, strings.Join(have, ", "))
	}
	return best, nil
}
