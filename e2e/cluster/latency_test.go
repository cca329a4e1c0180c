package cluster

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"
)

// histograms of the kubelet that tell where a pod's start goes, and how often each counts a pod. The first begins with
// the pod's creation, which the API server has in whole seconds, so that it tells up to a second too much, and ends when
// the kubelet sees its own word that the pod runs. The second begins when the kubelet sees the pod, and counts it once
// before anything is done. The others are the calls of the CRI.
var histograms = []struct {
	name   string
	counts float64
}{
	{`kubelet_pod_start_sli_duration_seconds`, 1},
	{`kubelet_pod_start_duration_seconds`, 2},
	{`kubelet_runtime_operations_duration_seconds{operation_type="run_podsandbox"}`, 1},
	{`kubelet_runtime_operations_duration_seconds{operation_type="create_container"}`, 1},
	{`kubelet_runtime_operations_duration_seconds{operation_type="start_container"}`, 1},
}

var histogramName = regexp.MustCompile(`^(\w+)(.*)$`)

// total is a histogram's sum, in seconds, and its count.
func total(t *testing.T, metrics, histogram string) (sum, count float64) {
	t.Helper()
	parts := histogramName.FindStringSubmatch(histogram)
	read := func(suffix string) float64 {
		found := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(parts[1]+suffix+parts[2]) + ` (\S+)$`).FindStringSubmatch(metrics)
		if found == nil {
			t.Fatalf("the kubelet's metrics have no %s of %s", suffix, histogram)
		}
		n, err := strconv.ParseFloat(found[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return read("_sum"), read("_count")
}

// TestLatency measures, and does not judge: a pod of kubectl run with the image present, from the start of that command
// to the end of the kubectl wait that sees it Running; and what the kubelet says of the same pods.
func TestLatency(t *testing.T) {
	s := newSpace(t)
	s.apply(pod("first", "sleep 1000", "")) // has the image pulled
	s.ready("first")
	kubeletMetrics := func() string { return kubectl(t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics") }
	before := kubeletMetrics()
	const pods = 10
	var whole []time.Duration
	for i := range pods {
		name := fmt.Sprintf("run-%d", i)
		began := time.Now()
		s.kubectl("run", name, "--image", the.busybox, "--image-pull-policy=Never", "--restart=Never", "--command", "--", "sleep", "1000")
		s.kubectl("wait", "pod/"+name, "--for=jsonpath={.status.phase}=Running", "--timeout="+patience.String())
		whole = append(whole, time.Since(began))
		s.kubectl("delete", "pod", name, "--now")
	}
	after := kubeletMetrics()
	slices.Sort(whole)
	fmt.Printf("=== kubectl run to Running, of %d: median %.2f s, least %.2f s, most %.2f s\n",
		pods, (whole[pods/2-1]+whole[pods/2]).Seconds()/2, whole[0].Seconds(), whole[pods-1].Seconds())
	for _, h := range histograms {
		sum0, count0 := total(t, before, h.name)
		sum1, count1 := total(t, after, h.name)
		counted := (count1 - count0) / h.counts
		if counted < pods {
			t.Errorf("%s has counted %.1f of %d pods", h.name, counted, pods)
			continue
		}
		fmt.Printf("===   mean of %.0f: %.1f ms, %s\n", counted, 1000*(sum1-sum0)/counted, h.name)
	}
}
