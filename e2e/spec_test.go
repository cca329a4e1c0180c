package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestContainerSpec: what a container is asked to be, on the whole way from crictl to the kernel. The points of it are
// tested one by one beside the code; here it is that they arrive.
func TestContainerSpec(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("spec", object{"linux": object{"security_context": object{"namespace_options": object{"pid": 1}},
		"sysctls": object{"net.ipv4.ip_unprivileged_port_start": "80"}}})

	own := object{"security_context": object{"namespace_options": object{"pid": 1}}}

	t.Run("CDI device", func(t *testing.T) {
		n.t = t
		// A directory of the user's own, which is made and filled while the node runs.
		dir := n.mkdir("config", "cdi")
		device := object{"CDI_devices": []object{{"name": "example.com/full=0"}}, "command": []string{"sleep", "1000"}, "linux": own}
		if r := n.try("create", pod, n.containerConfig("cdi", image, device), file); r.code == 0 || !strings.Contains(r.errs, "example.com/full=0") || !strings.Contains(r.errs, dir) {
			t.Errorf("an unknown device: exit code %d, %s", r.code, r.errs)
		}
		n.writeAt(dir+"/full.yaml", fmt.Sprintf(`{cdiVersion: "0.6.0", kind: example.com/full, devices: [{name: "0", containerEdits: {
			env: ["CDI=yes"], deviceNodes: [{path: /dev/mine, hostPath: /dev/full}],
			hooks: [{hookName: createContainer, path: /bin/sh, args: [sh, -c, "cat >%s"]}]}}]}`, n.path("work", "hook")))
		id := n.start(pod, file, "cdi", image, device)
		if out := n.exec(id, "sh", "-c", "echo $CDI; ls -l /dev/mine | cut -c1; echo x 2>/dev/null >/dev/mine || echo full"); out != "yes\nc\nfull" {
			t.Errorf("in the container: %q", out)
		}
		if out := n.exec(id, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"); out != "80" {
			t.Errorf("sysctl of the pod: %q", out)
		}
		if state, err := os.ReadFile(n.path("work", "hook")); err != nil || !strings.Contains(string(state), id) {
			t.Errorf("the hook got %q, %v", state, err)
		}
	})
	t.Run("pid namespace of another container", func(t *testing.T) {
		n.t = t
		target := n.start(pod, file, "target", image, shell("exec sleep 4321").with("linux", own))
		debug := n.start(pod, file, "debug", image, shell("sleep 1000").with("linux",
			object{"security_context": object{"namespace_options": object{"pid": 3, "target_id": target}}}))
		if out := n.exec(debug, "ps"); !strings.Contains(out, "sleep 4321") {
			t.Errorf("the debug container sees\n%s", out)
		}
		if out := n.exec(target, "ps"); !strings.Contains(out, "sleep 1000") {
			t.Errorf("the target sees\n%s", out)
		}
		n.crictl("stop", "--timeout", "0", target)
		eventually(t, 10*time.Second, "the debug container ends with the first process of its namespace", func() error {
			if state := n.inspect("inspect", debug).text("state"); state != "CONTAINER_EXITED" {
				return fmt.Errorf("it is %s", state)
			}
			return nil
		})
	})
	t.Run("image volume", func(t *testing.T) {
		n.t = t
		volume := func(sub string) object {
			return shell("sleep 1000").with("mounts", []object{{"container_path": "/v", "image": object{"image": image}, "image_sub_path": sub}}).with("linux", own)
		}
		if r := n.try("create", pod, n.containerConfig("volume", image, volume("no/such")), file); r.code == 0 || !strings.Contains(r.errs, "ImageVolumeMountFailed: ") {
			t.Errorf("a sub path that the image does not have: exit code %d, %s", r.code, r.errs)
		}
		id := n.start(pod, file, "volume", image, volume("www"))
		if out := n.exec(id, "sh", "-c", "cat /v/index.html; touch /v/x 2>/dev/null || echo read-only"); out != "hello from a coracle\nread-only" {
			t.Errorf("in the volume: %q", out)
		}
	})
	n.t = t
	n.down("--grace", "0s")
}
