package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/coracle-cri/coracle/e2e/box"
	"github.com/coracle-cri/coracle/e2e/fixture"
)

// programs is the directory of Kubernetes' programs, crictl a program; keep leaves the cluster for a look at it. inVM: this
// is the test VM (scripts/vm.sh), where every controller is delegated.
var (
	keep     = os.Getenv("CORACLE_E2E_KEEP") != ""
	programs = os.Getenv("CORACLE_E2E_KUBE")
	crictl   = os.Getenv("CORACLE_E2E_CRICTL")
	inVM     = os.Getenv("CORACLE_E2E_VM") != ""
)

// scriptTimeout is for one run of scripts/cluster. An emulated machine takes minutes for what else takes seconds.
var scriptTimeout = map[bool]time.Duration{false: 5 * time.Minute, true: 15 * time.Minute}[inVM]

// the is the cluster of all tests.
var the cluster

// cluster is a running one, with the registry that its images come from.
type cluster struct {
	dir        string
	env        []string
	kubeconfig string
	registry   *fixture.Registry
	busybox    string // image references
	health     string
}

// name of the cluster, and of its only node.
const (
	name = "e2e"
	node = "kube-e2e"
)

func TestMain(m *testing.M) {
	box.Init()
	if programs == "" {
		fmt.Println("e2e/cluster: skipped: CORACLE_E2E_KUBE does not name Kubernetes' programs; to run these tests: make e2e-kube")
		os.Exit(0)
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e/cluster:", err)
		code = 1
	}
	os.Exit(code)
}

// run starts the cluster, runs the tests and takes everything away.
func run(m *testing.M) (code int, err error) {
	if os.Getuid() == 0 {
		return 1, errors.New("this is root, and coracle is for ordinary users; to run these tests: make e2e-kube")
	}
	dir, err := os.MkdirTemp("/tmp", "ck-")
	if err != nil {
		return 1, err
	}
	defer func() {
		if !keep {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	the = cluster{dir: dir, env: append(os.Environ(), "XDG_RUNTIME_DIR="+dir+"/run", "XDG_DATA_HOME="+dir+"/data", "XDG_CONFIG_HOME="+dir+"/config",
		"CORACLE_CONFIG="+dir+"/coracle.yaml")}
	for _, sub := range []string{"run", "data", "config"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			return 1, err
		}
	}
	if err := the.fillRegistry(); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, the.registry.Close()) }()
	if err := the.up(); err != nil {
		return 1, errors.Join(err, the.down())
	}
	code = m.Run()
	return code, the.down()
}

// fillRegistry serves the images of the tests on loopback.
func (c *cluster) fillRegistry() (err error) {
	if c.registry, err = fixture.StartRegistry(fixture.RegistryOptions{}); err != nil {
		return err
	}
	busybox, err := fixture.Busybox()
	if err != nil {
		return err
	}
	health, err := programImage(filepath.Join(programs, "health"))
	if err != nil {
		return err
	}
	for repository, image := range map[string]v1.Image{"tests/busybox:1": busybox, "tests/health:1": health} {
		if _, err := c.registry.Push(context.Background(), repository, image); err != nil {
			return err
		}
	}
	c.busybox, c.health = c.registry.Addr+"/tests/busybox:1", c.registry.Addr+"/tests/health:1"
	return nil
}

// programImage is an image of one static program.
func programImage(path string) (v1.Image, error) {
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	w, err := fixture.NewLayerWriter(fixture.Gzip)
	if err != nil {
		return nil, err
	}
	if err := w.Add(fixture.File{Name: "program", Mode: 0o755, Body: string(program)}); err != nil {
		return nil, err
	}
	layer, err := w.Layer()
	if err != nil {
		return nil, err
	}
	return fixture.Image(v1.Config{Entrypoint: []string{"/program"}}, layer)
}

// kubeletSettings make the kubelet do within a test's time what it does within a day.
const kubeletSettings = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerLogMaxSize: 64Ki
containerLogMonitorInterval: 3s
imageMinimumGCAge: 2s
imageMaximumGCAge: 5s
syncFrequency: 10s
nodeLeaseDurationSeconds: 8
`

func (c *cluster) up() error {
	settings := filepath.Join(c.dir, "data", "coracle-"+node, "kubelet", "conf.d", "50-tests.conf")
	if err := os.MkdirAll(filepath.Dir(settings), 0o700); err != nil {
		return err
	}
	text := kubeletSettings
	if inVM {
		text += qosSettings
	}
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(c.dir, "coracle.yaml"), []byte(coracleSettings), 0o600); err != nil {
		return err
	}
	began := time.Now()
	if err := c.script("cluster", "up", "--name", name, "--bin", programs, "--timeout", fmt.Sprint((scriptTimeout - time.Minute).Seconds())); err != nil {
		return fmt.Errorf("scripts/cluster up: %w", err)
	}
	fmt.Printf("=== the cluster's node is ready after %.1f s\n", time.Since(began).Seconds())
	c.kubeconfig = filepath.Join(c.dir, "data", "coracle-"+node, "cluster", "pki", "admin.kubeconfig")
	return nil
}

// coracleSettings give the node the second runtime.
const coracleSettings = "handlers: {crun: {path: crun}}\n"

// down ends the cluster and looks for what it has left.
func (c *cluster) down() error {
	if keep {
		fmt.Printf("=== the cluster is kept; to end it, run: XDG_RUNTIME_DIR=%[1]s/run XDG_DATA_HOME=%[1]s/data scripts/cluster down --name %s; rm -r %[1]s\n", c.dir, name)
		return nil
	}
	began := time.Now()
	if err := c.script("cluster", "down", "--name", name); err != nil {
		return fmt.Errorf("scripts/cluster down: %w", err)
	}
	fmt.Printf("=== the cluster is down after %.1f s\n", time.Since(began).Seconds())
	var left []string
	for _, sub := range []string{"run", "data"} {
		entries, err := os.ReadDir(filepath.Join(c.dir, sub))
		if err != nil {
			return err
		}
		for _, e := range entries {
			left = append(left, filepath.Join(sub, e.Name()))
		}
	}
	// A process of the cluster has its directory in its command line, or in that of the node's parent.
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range lines {
		raw, err := os.ReadFile(file)
		if args := strings.ReplaceAll(string(raw), "\x00", " "); err == nil && strings.Contains(args, c.dir) {
			left = append(left, args)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("after scripts/cluster down there is still: %s", strings.Join(left, "; "))
	}
	return nil
}

// script runs one of the scripts, with its output shown.
func (c *cluster) script(script string, args ...string) error {
	path, err := filepath.Abs(filepath.Join("..", "..", "scripts", script))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), scriptTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = c.env, os.Stdout, os.Stderr
	cmd.WaitDelay = 5 * time.Second
	return cmd.Run()
}

// coracle runs the program under test, on the cluster's node.
func (c *cluster) coracle(args ...string) (string, error) {
	path, err := filepath.Abs(filepath.Join("..", "..", "bin", "coracle"))
	if err != nil {
		return "", err
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(c.env[:len(c.env):len(c.env)], "CORACLE_NAME="+node)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("coracle %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return string(out), nil
}

// crictl asks the node's CRI itself.
func (c *cluster) crictl(args ...string) (string, error) { return crictlOf(node, args...) }

// crictlOf asks the CRI of a node.
func crictlOf(node string, args ...string) (string, error) {
	socket := "unix://" + the.dir + "/run/coracle-" + node + "/coracle.sock"
	cmd := exec.Command(crictl, append([]string{"--timeout", patience.String()}, args...)...)
	cmd.Env = append(the.env[:len(the.env):len(the.env)], "CONTAINER_RUNTIME_ENDPOINT="+socket, "IMAGE_SERVICE_ENDPOINT="+socket)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("crictl %s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	return string(out), err
}
