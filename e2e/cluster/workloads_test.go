package cluster

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

const web = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: IMAGE
        env: [{name: GREETING, value: one}]
        command: [sh, -c, 'mkdir /tmp/w && echo "$GREETING from $(hostname)" >/tmp/w/index.html && exec httpd -f -p 8080 -h /tmp/w']
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
`

// TestDeployment: a service answers by its address and its name in the cluster and by its node port on the host, and
// follows its deployment when that is scaled and updated.
func TestDeployment(t *testing.T) {
	s := newSpace(t)
	s.apply(web)
	s.apply(pod("client", "sleep 1000", ""))
	s.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	s.ready("client")
	address, nodePort := s.get("service/web", "{.spec.clusterIP}"), s.get("service/web", "{.spec.ports[0].nodePort}")
	for _, host := range []string{address, "web", "web." + s.name + ".svc.cluster.local"} {
		s.eventually("the service answers as "+host, func() error {
			out, err := s.try("exec", "client", "--", "wget", "-qO-", "http://"+host+"/")
			if err == nil && !strings.HasPrefix(out, "one from web-") {
				err = fmt.Errorf("it says %q", out)
			}
			return err
		})
	}
	s.answers(nodePort, "one", 3)

	s.kubectl("scale", "deployment/web", "--replicas=1")
	s.eventually("the endpoints follow", func() error {
		if got := strings.Fields(s.kubectl("get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", "jsonpath={.items[*].endpoints[*].addresses[0]}")); len(got) != 1 {
			return fmt.Errorf("endpoints: %v", got)
		}
		return nil
	})
	s.answers(nodePort, "one", 1)

	s.kubectl("set", "env", "deployment/web", "GREETING=two")
	s.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	s.answers(nodePort, "two", 1)
	s.kubectl("rollout", "undo", "deployment/web")
	s.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	s.answers(nodePort, "one", 1)

	s.kubectl("delete", "service", "web")
	s.eventually("the host's port is given back", func() error {
		if answer, err := fetch(nodePort); err == nil {
			return fmt.Errorf("it answers %q", answer)
		}
		return nil
	})
}

// answers waits until the node port, asked on the host, is answered by exactly so many pods, all with this greeting.
func (s *space) answers(nodePort, greeting string, pods int) {
	s.t.Helper()
	s.eventually(fmt.Sprintf("%d pods answer %q", pods, greeting), func() error {
		seen := map[string]bool{}
		for range 20 {
			answer, err := fetch(nodePort)
			if err != nil {
				return err
			}
			if !strings.HasPrefix(answer, greeting+" from ") {
				return fmt.Errorf("an answer is %q", answer)
			}
			seen[answer] = true
		}
		if len(seen) != pods {
			return fmt.Errorf("%d pods have answered", len(seen))
		}
		return nil
	})
}

// fetch asks a port of the host's loopback, by a connection of its own.
func fetch(port string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:" + port + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	return string(raw), err
}

func TestHostPort(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("direct", "exec httpd -f -p 8080 -h /www", "") + "    ports: [{containerPort: 8080, hostPort: 18473, hostIP: 127.0.0.1}]\n")
	s.ready("direct")
	s.eventually("the host port answers", func() error {
		answer, err := fetch("18473")
		if err == nil && !strings.Contains(answer, "coracle") {
			err = fmt.Errorf("it says %q", answer)
		}
		return err
	})
}

// TestUDP: a node port over UDP, here of the cluster's own DNS, asked on the host.
func TestUDP(t *testing.T) {
	t.Parallel()
	const service = "dns-of-a-test"
	kubectl(t, "-n", "kube-system", "expose", "deployment", "coredns", "--name", service, "--type", "NodePort", "--port", "53", "--protocol", "UDP")
	t.Cleanup(func() { kubectl(t, "-n", "kube-system", "delete", "service", service) })
	nodePort := kubectl(t, "-n", "kube-system", "get", "service", service, "-o", "jsonpath={.spec.ports[0].nodePort}")
	want := kubectl(t, "get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", "127.0.0.1:"+nodePort)
	}}
	eventually(t, "the DNS answers at its node port", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		got, err := resolver.LookupHost(ctx, "kubernetes.default.svc.cluster.local.")
		if err == nil && !slices.Contains(got, want) {
			err = fmt.Errorf("it says %v, want %s", got, want)
		}
		return err
	})
}

func TestJobs(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(`
apiVersion: batch/v1
kind: Job
metadata: {name: three}
spec:
  completions: 3
  parallelism: 2
  template:
    spec:
      restartPolicy: OnFailure
      containers: [{name: main, image: IMAGE, command: [sh, -c, 'echo done by $(hostname)']}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: fails}
spec:
  backoffLimit: 1
  template:
    spec:
      restartPolicy: Never
      containers: [{name: main, image: IMAGE, command: [sh, -c, 'exit 3']}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: minutely}
spec:
  schedule: '* * * * *'
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: Never
          containers: [{name: main, image: IMAGE, command: [echo, tick]}]
`)
	s.wait("job/three", "condition=Complete")
	if got := s.get("job/three", "{.status.succeeded}"); got != "3" {
		t.Errorf("%s pods of the job have succeeded, want 3", got)
	}
	s.wait("job/fails", "condition=Failed")
	s.eventually("the cron job has made a job that ends well", func() error {
		got := s.kubectl("get", "jobs", "-o", `jsonpath={range .items[?(@.metadata.ownerReferences[0].name=="minutely")]}{.status.succeeded}{end}`)
		if !strings.HasPrefix(got, "1") {
			return fmt.Errorf("jobs of it that succeeded: %q", got)
		}
		return nil
	})
}
