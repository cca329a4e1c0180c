package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestProgramsAreNotOverwritten: what the keeper executes inside a container on the way to its program cannot be written
// from there, also not where the container has the keeper's program executed as its own (CVE-2019-5736).
func TestProgramsAreNotOverwritten(t *testing.T) {
	x := newTarget(t)
	digests := func() string {
		var out []byte
		for _, name := range []string{"coracle", "coracle-keeper"} {
			raw, err := os.ReadFile(filepath.Join(binDir, name))
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(raw)
			out = append(out, sum[:]...)
		}
		return string(out)
	}
	before := digests()
	for _, q := range []quarter{{name: "default"}, {name: "privileged", pod: object{"privileged": true}}} {
		pod, file := x.runPod(q.name, object{"linux": object{"security_context": q.pod}})
		id := x.start(pod, file, q.name, x.image, x.hostile(q, "/hostile overwrite"))
		for range 10 {
			for _, command := range [][]string{{"/proc/self/exe", "init"}, {"/proc/self/exe", "--version"}, {"/bin/true"}} {
				x.try(append([]string{"exec", "--sync", id}, command...)...) // most of it fails
			}
		}
		out := x.crictl("logs", id)
		if !strings.Contains(out, "overwrite: saw ") || strings.Contains(out, "overwrite: through") {
			t.Errorf("%s:\n%s", q.name, out)
		}
		t.Logf("%s: %s", q.name, strings.ReplaceAll(out, "\n", "; "))
		x.crictl("rmp", "-f", pod)
	}
	if digests() != before {
		t.Error("the programs have changed")
	}
	x.down("--grace", "0s")
}

// TestForkBomb: where no controller counts processes, a container that forks without end meets a limit below that of
// the user, and the node goes on.
func TestForkBomb(t *testing.T) {
	most := uint64(700)
	x := limitedTarget(t, most)
	daemon := x.daemon()
	quiet, quietFile := x.runPod("quiet", nil)
	bystander := x.start(quiet, quietFile, "bystander", x.image, shell("exec sleep 1000"))
	pod, file := x.runPod("bomb", nil)
	id := x.start(pod, file, "bomb", x.image, x.hostile(quarter{}, "exec /hostile bomb"))
	if started, node := x.bombed(id), most-most/8; started < 100 || started > node-node/4 {
		t.Errorf("the bomb: %d", started)
	}
	if out := x.exec(bystander, "echo", "well"); out != "well" {
		t.Errorf("another pod meanwhile: %q", out)
	}
	other, otherFile := x.runPod("late", nil)
	x.start(other, otherFile, "late", x.image, shell("exec sleep 1000"))
	x.crictl("rmp", "-f", pod)
	if now := x.daemon(); now != daemon {
		t.Errorf("the daemon was %d and is %d", daemon, now)
	}
	x.down("--grace", "0s")
}

// TestForkBombOfManyIDs: one that changes user ids takes all the processes that a node may have. Hardly
// anything can be started there then, and nothing ends either: what runs goes on, and the pod can be removed. The user has some left.
func TestForkBombOfManyIDs(t *testing.T) {
	most := uint64(700)
	x := limitedTarget(t, most)
	daemon, keeper := x.daemon(), x.process("coracle-keeper")
	quiet, quietFile := x.runPod("quiet", nil)
	bystander := x.start(quiet, quietFile, "bystander", x.image, shell("exec sleep 1000"))
	pod, file := x.runPod("bomb", nil)
	id := x.start(pod, file, "bomb", x.image, x.hostile(quarter{}, "exec /hostile bomb 8"))
	if started, node := x.bombed(id), most-most/8; started <= node-node/4 || started > node {
		t.Fatalf("the bomb: %d", started) // one id alone has three quarters
	}
	for range 3 {
		x.try("exec", bystander, "true") // there may be a process for it
		x.crictl("ps")
		x.crictl("stats")
	}
	out, err := exec.Command("prlimit", fmt.Sprintf("--nproc=%d", most), "sh", "-c", "true & wait").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("the user cannot start anything: %v: %s", err, out)
	}
	x.crictl("rmp", "-f", pod)
	if out := x.exec(bystander, "echo", "well"); out != "well" {
		t.Errorf("another pod afterwards: %q", out)
	}
	if d, k := x.daemon(), x.process("coracle-keeper"); d != daemon || k != keeper {
		t.Errorf("the daemon was %d and is %d, the keeper was %d and is %d", daemon, d, keeper, k)
	}
	x.down("--grace", "0s")
}

// limitedTarget is a node whose user may have only so many processes. The test itself gets its own limit back.
func limitedTarget(t *testing.T, most uint64) *target {
	t.Helper()
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &own); err != nil {
		t.Fatal(err)
	}
	if own.Cur < most {
		t.Skipf("the user may have %d processes", own.Cur)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: most, Max: own.Max}); err != nil {
		t.Fatal(err)
	}
	back := func() {
		if err := unix.Setrlimit(unix.RLIMIT_NPROC, &own); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(back)
	x := newTarget(t)
	back()
	return x
}

// bombed waits for a bomb to have no way on, and tells how many processes it has started.
func (x *target) bombed(id string) (started uint64) {
	x.t.Helper()
	x.awaitLog(id, "bomb: ")
	out := x.crictl("logs", id)
	if _, err := fmt.Sscanf(out, "bomb: %d", &started); err != nil {
		x.t.Errorf("the bomb: %s", out)
	}
	return started
}

// TestForkBombCannotChangeIDs: without CAP_SETUID and setuid files a container has one user id, which has the limit.
func TestForkBombCannotChangeIDs(t *testing.T) {
	most := uint64(700)
	x := limitedTarget(t, most)
	daemon := x.daemon()
	for _, q := range []quarter{
		{name: "without", container: object{"capabilities": object{"drop_capabilities": []string{"SETUID"}}, "no_new_privs": true}},
		{name: "restricted", container: object{"capabilities": object{"drop_capabilities": []string{"ALL"}}, "run_as_user": object{"value": 1000}, "no_new_privs": true}},
	} {
		pod, file := x.runPod(q.name, nil)
		id := x.start(pod, file, "bomb", x.image, x.hostile(q, "exec /hostile bomb 3"))
		if started, node := x.bombed(id), most-most/8; started < 100 || started > node-node/4 {
			t.Errorf("%s: the bomb: %d", q.name, started)
		}
		x.crictl("rmp", "-f", pod)
	}
	if now := x.daemon(); now != daemon {
		t.Errorf("the daemon was %d and is %d", daemon, now)
	}
	x.down("--grace", "0s")
}

// TestMountsStayInside: destinations of mounts are found in the container's root, whatever symbolic links an image has
// there, and whatever another container does meanwhile with a volume that they lie in.
func TestMountsStayInside(t *testing.T) {
	x := newTarget(t)
	canary := x.mkdir("canary")
	source := x.mkdir("source")
	volume := x.mkdir("volume")
	if err := os.Mkdir(filepath.Join(volume, "a"), 0o777); err != nil {
		t.Fatal(err)
	}
	// Absolute, and relative by more parents than there are: in a container both are its own.
	up := strings.Repeat("../", 30) + strings.TrimPrefix(canary, "/")
	if err := os.Symlink(up, filepath.Join(volume, "b")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(canary, filepath.Join(volume, "still")); err != nil {
		t.Fatal(err)
	}
	pod, file := x.runPod("mounts", nil)
	hostile := x.hostile(quarter{}, "exec /hostile exchange /volume")
	shared := object{"host_path": volume, "container_path": "/volume"}
	hostile["mounts"] = append(hostile["mounts"].([]object), shared)
	swapper := x.start(pod, file, "swapper", x.image, hostile)
	for i := range 30 {
		name := "victim" + strconv.Itoa(i)
		config := x.containerConfig(name, x.image, shell("exec sleep 1000").with("mounts", []object{shared,
			{"host_path": source, "container_path": "/volume/a/made/here"},
			{"host_path": source, "container_path": "/volume/still/made/here"}}))
		r := x.try("create", pod, config, file)
		if r.code == 0 {
			x.try("start", strings.TrimSpace(r.out)) // it may find the link gone: an error is an answer too
			x.crictl("rm", "-f", strings.TrimSpace(r.out))
		}
		entries, err := os.ReadDir(canary)
		if err != nil || len(entries) > 0 {
			t.Fatalf("round %d: a mount has left the container: %v, %v", i, entries, err)
		}
	}
	if out := x.crictl("logs", swapper); out != "" {
		t.Errorf("the exchange ended: %s", out)
	}
	x.crictl("rmp", "-f", pod)
	x.down("--grace", "0s")
}

// TestLogDirectoryOfAContainer: a container that has its log directory as a volume aims its log at a file of the host's,
// and the kubelet has it opened anew. Its log is in that directory itself, and as the kubelet has it, in one below.
func TestLogDirectoryOfAContainer(t *testing.T) {
	x := newTarget(t)
	secret := x.write("secret", "untouched")
	logs, host := x.mkdir("logs"), x.mkdir("host")
	victim := x.write("host/0.log", "untouched")
	pod, file := x.runPod("logs", object{"log_directory": logs})
	liar := func(name, path string) string {
		return x.start(pod, file, name, x.image, shell("while :; do echo from the container; sleep 0.01; done").with("log_path", path).
			with("mounts", []object{{"host_path": logs, "container_path": "/logs"}}))
	}
	flat, nested := liar("flat", "liar.log"), liar("nested", "liar/0.log")
	reopen := func(id, trick string, works bool) {
		t.Helper()
		x.exec(id, "sh", "-c", "cd /logs; "+trick+"; true")
		r := x.try("logs", "--reopen", id)
		time.Sleep(50 * time.Millisecond) // a few lines
		for _, path := range []string{secret, victim} {
			if raw, err := os.ReadFile(path); err != nil || string(raw) != "untouched" {
				t.Fatalf("after %s: %s: %q, %v", trick, path, raw, err)
			}
		}
		if entries, err := os.ReadDir(host); err != nil || len(entries) != 1 {
			t.Fatalf("after %s: %v, %v", trick, entries, err)
		}
		if works != (r.code == 0) || !works && !strings.Contains(r.errs, "FailedPrecondition") {
			t.Errorf("after %s, reopen: %d, %s", trick, r.code, r.errs)
		}
	}
	for _, trick := range []string{"ln -s " + secret + " liar.log", "mkfifo liar.log", "mkdir liar.log", "ln -s /dev/null liar.log"} {
		reopen(flat, "rm -rf liar.log; "+trick, false)
	}
	reopen(flat, "rm -rf liar.log", true)
	for _, trick := range []string{"ln -s ../host liar", "ln -s " + host + " liar", "ln -s /proc/self/root" + host + " liar", "touch liar", "mkdir else; ln -s else liar"} {
		reopen(nested, "rm -rf liar; "+trick, false)
	}
	if r := x.try("create", pod, x.containerConfig("late", x.image, shell("true").with("log_path", "liar/1.log")), file); r.code != 0 {
		t.Error(r.errs)
	} else if r := x.try("start", strings.TrimSpace(r.out)); r.code == 0 || !strings.Contains(r.errs, "FailedPrecondition") {
		t.Errorf("start: %d, %s", r.code, r.errs)
	}
	reopen(nested, "rm -rf liar; mkdir liar", true)
	x.crictl("rmp", "-f", pod)
	x.down("--grace", "0s")
}
