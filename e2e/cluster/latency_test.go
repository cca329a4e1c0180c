package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestLatency measures, and does not judge: a pod of kubectl run, from the command to Running as a watch sees it, with
// the image present.
func TestLatency(t *testing.T) {
	s := newSpace(t)
	s.apply(pod("first", "sleep 1000", "")) // has the image pulled
	s.ready("first")
	var whole, kubelets []time.Duration
	for i := range 10 {
		name := fmt.Sprintf("run-%d", i)
		began := time.Now()
		s.kubectl("run", name, "--image", the.busybox, "--image-pull-policy=Never", "--restart=Never", "--command", "--", "sleep", "1000")
		s.kubectl("wait", "pod/"+name, "--for=jsonpath={.status.phase}=Running", "--timeout="+patience.String())
		whole = append(whole, time.Since(began))
		var p struct {
			Status struct {
				StartTime  time.Time `json:"startTime"`
				Conditions []struct {
					Type               string    `json:"type"`
					LastTransitionTime time.Time `json:"lastTransitionTime"`
				} `json:"conditions"`
			} `json:"status"`
		}
		if err := json.Unmarshal([]byte(s.kubectl("get", "pod", name, "-o", "json")), &p); err != nil {
			t.Fatal(err)
		}
		for _, c := range p.Status.Conditions {
			if c.Type == "Ready" {
				kubelets = append(kubelets, c.LastTransitionTime.Sub(p.Status.StartTime))
			}
		}
		s.kubectl("delete", "pod", name, "--now")
	}
	slices.Sort(whole)
	slices.Sort(kubelets)
	fmt.Printf("=== kubectl run to Running, of 10: median %.2f s, least %.2f s, most %.2f s\n", whole[5].Seconds(), whole[0].Seconds(), whole[9].Seconds())
}
