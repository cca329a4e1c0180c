package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// summary is what matters here of the kubelet's /stats/summary.
type summary struct {
	Node struct {
		Fs struct {
			CapacityBytes uint64 `json:"capacityBytes"`
		} `json:"fs"`
		Runtime struct {
			ImageFs struct {
				CapacityBytes  uint64 `json:"capacityBytes"`
				AvailableBytes uint64 `json:"availableBytes"`
				UsedBytes      uint64 `json:"usedBytes"`
			} `json:"imageFs"`
		} `json:"runtime"`
	} `json:"node"`
	Pods []podSummary `json:"pods"`
}

type podSummary struct {
	PodRef struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"podRef"`
	Network struct {
		TxBytes uint64 `json:"txBytes"`
	} `json:"network"`
	Containers []struct {
		Name   string `json:"name"`
		Rootfs struct {
			UsedBytes uint64 `json:"usedBytes"`
		} `json:"rootfs"`
		Logs struct {
			UsedBytes uint64 `json:"usedBytes"`
		} `json:"logs"`
		CPU struct {
			UsageCoreNanoSeconds uint64 `json:"usageCoreNanoSeconds"`
		} `json:"cpu"`
		Memory struct {
			WorkingSetBytes uint64 `json:"workingSetBytes"`
		} `json:"memory"`
	} `json:"containers"`
}

// amounts of what the pod of TestStats does, in bytes.
const (
	wrote    = 5 << 20  // to its root file system, and once over its network
	holds    = 32 << 20 // in memory; the shell may hold some copies of it
	logLines = 1000
)

const busy = `x=$(head -c %d /dev/zero | tr '\0' x)
mkdir /tmp/w && dd if=/dev/zero of=/tmp/w/file bs=1M count=%d 2>/dev/null
i=0; while [ $i -lt %d ]; do echo a line of the log, $i; i=$((i+1)); done
i=0; while [ $i -lt 600000 ]; do i=$((i+1)); done
times
httpd -f -p 8080 -h /tmp/w; true # the shell stays, with what it holds`

// cpuTime are the seconds that the shell itself has spent, and those of its children, as it says (POSIX: times).
func cpuTime(t *testing.T, log string) (own, children float64) {
	t.Helper()
	found := regexp.MustCompile(`(?m)^(\d+)m([\d.]+)s (\d+)m([\d.]+)s$`).FindAllStringSubmatch(log, -1)
	if len(found) != 2 {
		t.Fatalf("the shell has not told its times:\n%s", log)
	}
	seconds := func(m []string) (sum float64) {
		for i, unit := range []float64{60, 1, 60, 1} {
			n, err := strconv.ParseFloat(m[i+1], 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += n * unit
		}
		return sum
	}
	return seconds(found[0]), seconds(found[1])
}

// TestStats: what a pod has written to its root file system, to its log and over its network, the memory that it holds
// and the time that it has spent are in the kubelet's statistics and metrics; the images' file system is the disk's.
func TestStats(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("busy", fmt.Sprintf(busy, holds, wrote>>20, logLines), "") + "    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}\n")
	s.ready("busy")
	if got := len(kubectl(t, "get", "--raw", "/api/v1/namespaces/"+s.name+"/pods/busy:8080/proxy/file")); got != wrote {
		t.Errorf("%d bytes of %d come by the network", got, wrote)
	}
	own, children := cpuTime(t, s.kubectl("logs", "busy", "--tail=2"))
	least, most := own-0.1, 1.5*(own+children)+3 // probes and httpd, too
	within := func(what string, got, least, most float64) error {
		if got < least || got > most {
			return fmt.Errorf("%s is %.2f, want %.2f to %.2f", what, got, least, most)
		}
		return nil
	}
	s.eventually("the pod's statistics are right", func() error {
		p, err := s.summaryOf("busy")
		if err != nil {
			return err
		}
		c := p.Containers[0]
		return errors.Join(
			within("the root file system", float64(c.Rootfs.UsedBytes), wrote, 2*wrote),
			within("the log", float64(c.Logs.UsedBytes), logLines*20, logLines*100),
			within("what was sent", float64(p.Network.TxBytes), wrote, 2*wrote),
			within("the memory", float64(c.Memory.WorkingSetBytes), holds, 6*holds),
			within("the CPU time", float64(c.CPU.UsageCoreNanoSeconds)/float64(time.Second), least, most))
	})
	s.eventually("the pod's metrics are right", func() error {
		cadvisor := kubectl(t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics/cadvisor")
		resource := kubectl(t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics/resource")
		return errors.Join(
			within("container_fs_usage_bytes", s.metric(cadvisor, "container_fs_usage_bytes"), wrote, 2*wrote),
			within("container_network_transmit_bytes_total", s.metric(cadvisor, "container_network_transmit_bytes_total"), wrote, 2*wrote),
			within("container_memory_working_set_bytes", s.metric(cadvisor, "container_memory_working_set_bytes"), holds, 6*holds),
			within("container_cpu_usage_seconds_total", s.metric(cadvisor, "container_cpu_usage_seconds_total"), least-1, most), // of whole seconds
			within("the resource metrics' memory", s.metric(resource, "container_memory_working_set_bytes"), holds, 6*holds),
			within("the resource metrics' CPU time", s.metric(resource, "container_cpu_usage_seconds_total"), least, most))
	})
}

// summaryOf is what /stats/summary tells of a pod. What it tells of the node has to be sound.
func (s *space) summaryOf(name string) (p podSummary, err error) {
	var sum summary
	if err := json.Unmarshal([]byte(kubectl(s.t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/stats/summary")), &sum); err != nil {
		return p, err
	}
	images := sum.Node.Runtime.ImageFs
	if images.CapacityBytes == 0 || images.AvailableBytes == 0 || images.UsedBytes == 0 || images.CapacityBytes != sum.Node.Fs.CapacityBytes {
		return p, fmt.Errorf("the images' file system is %+v, the node's %+v", images, sum.Node.Fs)
	}
	for _, p := range sum.Pods {
		if p.PodRef.Namespace == s.name && p.PodRef.Name == name && len(p.Containers) == 1 {
			return p, nil
		}
	}
	return p, fmt.Errorf("there is no pod %s of %s with a container among %d", name, s.name, len(sum.Pods))
}

// metric is the value of a metric of the space's only pod; -1 where there is none.
func (s *space) metric(text, name string) float64 {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, name+"{") && strings.Contains(line, `namespace="`+s.name+`"`) {
			rest := strings.Fields(line[strings.LastIndex(line, "}")+1:])
			if n, err := strconv.ParseFloat(rest[0], 64); err == nil {
				return n
			}
		}
	}
	return -1
}
