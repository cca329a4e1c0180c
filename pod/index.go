package pod

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// index finds pods and containers. Pods are in it from the first step of their making, so that an early exit
// of their pause process is not missed; they are found by ids only once they were ready.
type index struct {
	mu         sync.RWMutex // guards everything below
	names      map[string]string
	pods       map[string]*pod
	containers map[string]*container
}

func newIndex() *index {
	return &index{names: map[string]string{}, pods: map[string]*pod{}, containers: map[string]*container{}}
}

// newID returns 64 hexadecimal digits.
func newID() string {
	raw := make([]byte, 32)
	rand.Read(raw) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(raw)
}

// podName is what must be unique: the CRI wants the four together to identify a sandbox.
func podName(m *runtimeapi.PodSandboxMetadata) string {
	return fmt.Sprintf("pod %q %q %q %d", m.GetNamespace(), m.GetName(), m.GetUid(), m.GetAttempt())
}

// containerName: "(name, attempt) is unique within a sandbox for the entire lifetime of the sandbox".
func containerName(podID string, m *runtimeapi.ContainerMetadata) string {
	return fmt.Sprintf("container %s %q %d", podID, m.GetName(), m.GetAttempt())
}

func (x *index) reserve(name, id string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if owner, taken := x.names[name]; taken {
		remove := "rmp -f"
		if strings.HasPrefix(name, "container ") {
			remove = "rm -f"
		}
		return exists("%s exists already with id %s, running or not; to remove it, run: crictl %s %s", name, owner, remove, owner)
	}
	x.names[name] = id
	return nil
}

func (x *index) release(name, id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.releaseLocked(name, id)
}

// releaseLocked leaves alone a name that another id has taken since.
func (x *index) releaseLocked(name, id string) {
	if x.names[name] == id {
		delete(x.names, name)
	}
}

func (x *index) addPod(p *pod) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.names[podName(p.spec.Config.GetMetadata())] = p.spec.ID
	x.pods[p.spec.ID] = p
}

func (x *index) addContainer(c *container) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.names[containerName(c.spec.PodID, c.spec.Config.GetMetadata())] = c.spec.ID
	x.containers[c.spec.ID] = c
}

func (x *index) dropPod(p *pod) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.pods, p.spec.ID)
	x.releaseLocked(podName(p.spec.Config.GetMetadata()), p.spec.ID)
}

func (x *index) dropContainer(c *container) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.containers, c.spec.ID)
	x.releaseLocked(containerName(c.spec.PodID, c.spec.Config.GetMetadata()), c.spec.ID)
}

// pod finds by id or by a prefix that fits one pod.
func (x *index) pod(id string) (*pod, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return find("pod sandbox", id, x.pods, (*pod).visible)
}

// container finds by id or by a prefix that fits one container.
func (x *index) container(id string) (*container, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return find("container", id, x.containers, func(*container) bool { return true })
}

func find[T any](kind, id string, all map[string]T, visible func(T) bool) (T, error) {
	var found T
	if id == "" {
		return found, invalid("find %s: the id is empty", kind)
	}
	if v, ok := all[id]; ok && visible(v) {
		return v, nil
	}
	matches := 0
	for full, v := range all {
		if strings.HasPrefix(full, id) && visible(v) {
			found = v
			matches++
		}
	}
	switch matches {
	case 0:
		return found, notFound("find %s %q: not found", kind, id)
	case 1:
		return found, nil
	default:
		return found, invalid("find %s %q: the prefix fits %d of them", kind, id, matches)
	}
}

// observed returns whom a keeper's id belongs to: a container, or the pod whose pause process it is.
func (x *index) observed(id string) (*container, *pod) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.containers[id], x.pods[id]
}

func (x *index) allPods() []*pod {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all := make([]*pod, 0, len(x.pods))
	for _, p := range x.pods {
		if p.visible() {
			all = append(all, p)
		}
	}
	return all
}

// allContainers returns those of one pod, or of all where podID is empty.
func (x *index) allContainers(podID string) []*container {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var all []*container
	for _, c := range x.containers {
		if podID == "" || c.spec.PodID == podID {
			all = append(all, c)
		}
	}
	return all
}
