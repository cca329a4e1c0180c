package ctr

import (
	"path/filepath"
	"strings"

	"github.com/moby/profiles/seccomp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// seccomp sets the filter. The deprecated string counts only where the field is absent; absent both, the
// container is unconfined ("Default: "", which is identical with unconfined", CRI).
func (b *builder) seccomp() error {
	if b.security.GetPrivileged() {
		return nil // "Seccomp restrictions are not applied" (CRI)
	}
	profile := b.security.GetSeccomp()
	if profile == nil {
		var err error
		if profile, err = oldSeccompProfile(b.security.GetSeccompProfilePath()); err != nil { //nolint:staticcheck // older kubelets
			return err
		}
	}
	kind := profile.GetProfileType()
	if kind == runtimeapi.SecurityProfile_Unconfined {
		return nil
	}
	if !b.req.Host.Seccomp {
		return unsupported("seccomp profile %s: this kernel has no seccomp filters", kind)
	}
	switch kind {
	case runtimeapi.SecurityProfile_RuntimeDefault:
		p, err := seccomp.GetDefaultProfile(b.spec)
		if err != nil {
			return unsupported("seccomp profile RuntimeDefault: %w", err)
		}
		b.spec.Linux.Seccomp = p
		return nil
	case runtimeapi.SecurityProfile_Localhost:
		return b.localhostSeccomp(profile.GetLocalhostRef())
	}
	return invalid("seccomp: profile type %d is unknown", kind)
}

// localhostSeccomp loads a file in the format of the OCI or of Docker. "For seccomp, it must be an absolute path to
// the seccomp profile" (CRI).
func (b *builder) localhostSeccomp(path string) error {
	if !filepath.IsAbs(path) {
		return invalid("seccomp profile %q: type Localhost needs an absolute path", path)
	}
	raw, err := b.req.Host.FS.ReadFile(path)
	if err != nil {
		return invalid("read seccomp profile: %w", err)
	}
	p, err := seccomp.LoadProfile(string(raw), b.spec)
	if err != nil {
		return invalid("read seccomp profile %s: %w", path, err)
	}
	if p == nil {
		return invalid("seccomp profile %s has neither a default action nor rules", path)
	}
	b.spec.Linux.Seccomp = p
	return nil
}

// oldSeccompProfile reads the deprecated seccomp_profile_path.
func oldSeccompProfile(s string) (*runtimeapi.SecurityProfile, error) {
	switch path, local := strings.CutPrefix(s, "localhost/"); {
	case s == "" || s == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case s == "runtime/default" || s == "docker/default":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case local:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: path}, nil
	}
	return nil, invalid("seccomp profile %q: runtime/default, unconfined or localhost/PATH", s)
}
