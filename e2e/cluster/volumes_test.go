package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestVolumes: every kind that the kubelet makes on the node, and what it sets on them.
func TestVolumes(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	host := t.TempDir()
	if err := os.WriteFile(filepath.Join(host, "file"), []byte("of the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.apply(`
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue, shape: round}
---
apiVersion: v1
kind: Secret
metadata: {name: secret}
stringData: {password: xyzzy}
---
apiVersion: v1
kind: Pod
metadata: {name: reads, labels: {kind: reader}}
spec:
  restartPolicy: Never
  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000}
  volumes:
  - {name: settings, configMap: {name: settings}}
  - {name: secret, secret: {secretName: secret, defaultMode: 0440}}
  - name: all
    projected:
      sources:
      - configMap: {name: settings, items: [{key: color, path: my/color}]}
      - secret: {name: secret}
      - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
      - serviceAccountToken: {path: token, audience: somebody, expirationSeconds: 600}
  - {name: downward, downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}, {path: memory, resourceFieldRef: {containerName: main, resource: requests.memory}}]}}
  - {name: disk, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
  - {name: host, hostPath: {path: ` + host + `, type: Directory}}
  containers:
  - name: main
    image: IMAGE
    resources: {requests: {memory: 16Mi}}
    env:
    - {name: COLOR, valueFrom: {configMapKeyRef: {name: settings, key: color}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: secret, key: password}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: CPUS, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
    volumeMounts:
    - {name: settings, mountPath: /settings}
    - {name: settings, mountPath: /one/color, subPath: color}
    - {name: secret, mountPath: /secret, readOnly: true}
    - {name: all, mountPath: /all}
    - {name: downward, mountPath: /downward}
    - {name: disk, mountPath: /disk}
    - {name: disk, mountPath: /part, subPath: a/b}
    - {name: memory, mountPath: /memory}
    - {name: host, mountPath: /host, readOnly: true}
    command:
    - sh
    - -ec
    - |
      id -u; id -G
      echo "env $COLOR $PASSWORD $NODE $CPUS"; test -n "$ADDRESS"
      echo "files $(cat /settings/color) $(cat /settings/shape) $(cat /one/color) $(cat /secret/password) $(cat /all/my/color) $(cat /all/password)"
      echo "downward $(cat /downward/name) $(cat /downward/memory)"
      stat -Lc 'mode %a' /secret/password
      echo "room $(df -k /memory | awk 'NR == 2 {print $2}')"
      cat /all/labels; echo; test -s /all/token && echo token
      echo mine >/disk/file; echo sub >/part/file; echo "sub path $(cat /disk/a/b/file)"
      stat -c 'group %g' /disk /memory /disk/file
      awk '$2 == "/memory" {print "memory is", $3}' /proc/mounts
      cat /host/file; echo; ! touch /host/other 2>/dev/null && echo "host is read-only"
      ! touch /settings/other 2>/dev/null && echo "settings are read-only"
`)
	log := s.succeeded("reads")
	want(t, log, "1000\n1000 2000\n", "env blue xyzzy "+node, "files blue round blue xyzzy blue xyzzy", "downward reads 16777216", "mode 440", "room 8192\n", `kind="reader"`, "token\n", "sub path sub",
		"group 2000\ngroup 2000\ngroup 2000\n", "memory is tmpfs", "of the host", "host is read-only", "settings are read-only")
}

// TestVolumeUpdate: a changed ConfigMap is seen in the running pod, and its container is not restarted for it.
func TestVolumeUpdate(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(`
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue}
`)
	s.apply(pod("reads", "sleep 1000", "  volumes: [{name: settings, configMap: {name: settings}}]") + "    volumeMounts: [{name: settings, mountPath: /settings}]\n")
	s.ready("reads")
	s.kubectl("patch", "configmap", "settings", "--patch", `{"data": {"color": "green"}}`)
	s.eventually("the pod sees the change", func() error {
		if got := s.exec("reads", "cat /settings/color"); got != "green" {
			return fmt.Errorf("it sees %q", got)
		}
		return nil
	})
	if got := s.restarts("reads"); got != 0 {
		t.Errorf("the container was restarted %d times", got)
	}
}

func TestImageVolume(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("reads", "cat /image/www/index.html; ! touch /image/x 2>/dev/null && echo read-only", "  restartPolicy: Never\n  volumes: [{name: image, image: {reference: IMAGE}}]") +
		"    volumeMounts: [{name: image, mountPath: /image}]\n")
	want(t, s.succeeded("reads"), "hello from a coracle", "read-only")
}

// TestEmptyDirGoes: what a pod has written is not kept when it is deleted.
func TestEmptyDirGoes(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("writes", "echo something >/disk/file-of-this-test; chown 1234:1234 /disk/file-of-this-test; sleep 1000", "  volumes: [{name: disk, emptyDir: {}}]") +
		"    volumeMounts: [{name: disk, mountPath: /disk}]\n")
	s.ready("writes")
	uid := s.get("pod/writes", "{.metadata.uid}")
	dir := filepath.Join(the.dir, "data", "coracle-"+node, "kubelet", "lib", "pods", uid)
	if _, err := os.Stat(dir); err != nil {
		t.Fatal(err)
	}
	s.kubectl("delete", "pod", "writes")
	s.eventually("its directory is removed", func() error {
		if _, err := os.Stat(dir); err == nil {
			return fmt.Errorf("%s is there", dir)
		}
		return nil
	})
	mounts, err := the.coracle("enter", "--", "cat", "/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(mounts, uid) {
		t.Errorf("a mount of the deleted pod is left:\n%s", mounts)
	}
}
