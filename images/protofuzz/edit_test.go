package protofuzz

import (
	"math/rand/v2"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestEditReaches: random scripts set every field of a large request sooner or later, and what comes out is always a
// message that the wire format can carry.
func TestEditReaches(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	seen := map[string]bool{}
	for range 20000 {
		script := make([]byte, random.IntN(200))
		for i := range script {
			script[i] = byte(random.Uint32())
		}
		m := &runtimeapi.CreateContainerRequest{}
		Edit(m.ProtoReflect(), script)
		raw, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := proto.Unmarshal(raw, &runtimeapi.CreateContainerRequest{}); err != nil {
			t.Fatal(err)
		}
		security := m.GetConfig().GetLinux().GetSecurityContext()
		for name, set := range map[string]bool{
			"mount path": len(m.GetConfig().GetMounts()) > 0 && m.GetConfig().GetMounts()[0].GetHostPath() != "",
			"env":        len(m.GetConfig().GetEnvs()) > 0 && len(m.GetConfig().GetEnvs()[0].GetValue()) > 0,
			"user":       security.GetRunAsUser().GetValue() < 0, "target": security.GetNamespaceOptions().GetTargetId() != "",
			"unified": m.GetConfig().GetLinux().GetResources().GetUnified()["memory.max"] != "", "sandbox": m.GetSandboxConfig().GetHostname() != "",
		} {
			seen[name] = seen[name] || set
		}
	}
	if len(seen) == 0 {
		t.Fatal("nothing was set")
	}
	for name, set := range seen {
		if !set {
			t.Errorf("%s was never set", name)
		}
	}
}
