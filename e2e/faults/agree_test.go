package faults

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// agrees compares what the CRI says with what the kernel and the disk have. Everything belongs to somebody whom the CRI
// lists; who is listed as ready, created, running or exited has what that takes.
func (n *node) agrees() error {
	return n.settles(func(c *census) error {
		pods, err := n.runtime.ListPodSandbox(n.context(), &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		containers, err := n.runtime.ListContainers(n.context(), &runtimeapi.ListContainersRequest{})
		if err != nil {
			return err
		}
		podIDs, containerIDs, expected := map[string]bool{}, map[string]bool{}, 0
		var errs []error
		for _, p := range pods.Items {
			podIDs[p.Id] = true
			errs = append(errs, n.podAgrees(c, p))
			if pause, err := n.keeperPid(p.Id); err == nil && pause != 0 {
				expected++
				if !c.live[pause] {
					errs = append(errs, fmt.Errorf("the pause process %d of pod %s is dead", pause, p.Id))
				}
			}
		}
		for _, x := range containers.Containers {
			containerIDs[x.Id] = true
			errs = append(errs, n.containerAgrees(c, x))
			if x.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
				expected++
			}
		}
		if expected != len(c.live) {
			errs = append(errs, fmt.Errorf("%d containers and pause processes run, and the keeper has %d children", expected, len(c.live)))
		}
		for kind, of := range map[string][]map[string]bool{"pods": {podIDs}, "net/pods": {podIDs}, "address": {podIDs}, "link": {podIDs},
			"containers": {containerIDs}, "images/rootfs": {containerIDs}, "images/volumes": {containerIDs}, "keeper": {containerIDs, podIDs},
			"cgroup": {containerIDs, podIDs}} {
			for id, what := range c.owned[kind] {
				if !of[0][id] && !of[len(of)-1][id] {
					errs = append(errs, fmt.Errorf("%s %s, of whom the CRI does not list", kind, what))
				}
			}
		}
		return errors.Join(errs...)
	})
}

func (n *node) podAgrees(c *census, p *runtimeapi.PodSandbox) error {
	answer, err := n.runtime.PodSandboxStatus(n.context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.Id})
	if err != nil {
		return err
	}
	if answer.Status.State != p.State {
		return fmt.Errorf("pod %s is %s in the list and %s in its status", p.Id, p.State, answer.Status.State)
	}
	if p.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil
	}
	var errs []error
	for _, kind := range []string{"pods", "net/pods", "address", "link"} {
		if c.owned[kind][p.Id] == "" {
			errs = append(errs, fmt.Errorf("pod %s is ready and has no %s", p.Id, kind))
		}
	}
	for _, mount := range []string{"ns/net", "ns/uts", "ns/ipc", "shm", "etc"} {
		if !c.mounts[filepath.Join(n.runtimeDir(), "pods", p.Id, mount)] {
			errs = append(errs, fmt.Errorf("pod %s is ready and has no %s", p.Id, mount))
		}
	}
	network := answer.Status.Network
	for _, ip := range append([]*runtimeapi.PodIP{{Ip: network.GetIp()}}, network.GetAdditionalIps()...) {
		owner, err := os.ReadFile(filepath.Join(n.runtimeDir(), "net", "ipam", ip.Ip))
		if errs = append(errs, err); err == nil && idIn(string(owner)) != p.Id {
			errs = append(errs, fmt.Errorf("pod %s says that it has %s, which is that of %q", p.Id, ip.Ip, owner))
		}
	}
	return errors.Join(errs...)
}

func (n *node) containerAgrees(c *census, x *runtimeapi.Container) error {
	answer, err := n.runtime.ContainerStatus(n.context(), &runtimeapi.ContainerStatusRequest{ContainerId: x.Id})
	if err != nil {
		return err
	}
	var errs []error
	if answer.Status.State != x.State {
		errs = append(errs, fmt.Errorf("container %s is %s in the list and %s in its status", x.Id, x.State, answer.Status.State))
	}
	if c.owned["containers"][x.Id] == "" || c.owned["images/rootfs"][x.Id] == "" || !c.mounts[filepath.Join(n.dataDir(), "images", "rootfs", x.Id, "merged")] {
		errs = append(errs, fmt.Errorf("container %s has no record or no root filesystem", x.Id))
	}
	pid, err := n.keeperPid(x.Id)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	if runs := x.State == runtimeapi.ContainerState_CONTAINER_RUNNING; runs != c.live[pid] {
		errs = append(errs, fmt.Errorf("container %s is %s; that its process %d lives is %v", x.Id, x.State, pid, c.live[pid]))
	}
	return errors.Join(errs...)
}

// keeperPid is the process that the keeper's record of a container names; 0 where it has none.
func (n *node) keeperPid(id string) (int, error) {
	var record struct{ State struct{ Pid int } }
	raw, err := os.ReadFile(filepath.Join(n.runtimeDir(), "keeper", id+".json"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return record.State.Pid, json.Unmarshal(raw, &record)
}
