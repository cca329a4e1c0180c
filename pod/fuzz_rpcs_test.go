package pod

import (
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// One target for each request type of RuntimeService. To run one: make fuzz RUN=FuzzCreateContainer.

func FuzzVersion(f *testing.F) {
	fuzzUnary(f, (*Service).Version, &runtimeapi.VersionRequest{Version: "0.1.0"})
}

func FuzzStatus(f *testing.F) {
	fuzzUnary(f, (*Service).Status, &runtimeapi.StatusRequest{Verbose: true})
}

func FuzzRuntimeConfig(f *testing.F) { fuzzUnary(f, (*Service).RuntimeConfig) }

func FuzzUpdateRuntimeConfig(f *testing.F) {
	cidr := func(s string) *runtimeapi.UpdateRuntimeConfigRequest {
		return &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: s}}}
	}
	fuzzUnary(f, (*Service).UpdateRuntimeConfig, cidr("10.1.0.0/16"), cidr("10.1.0.0/16,fd00::/64"), cidr("nonsense"))
}

// fullPod has a value in every field of a sandbox that a rootless node can honour.
func fullPod() *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "full", Uid: "u", Namespace: "n", Attempt: 1}, Hostname: "full", LogDirectory: "/logs",
		DnsConfig: &runtimeapi.DNSConfig{Servers: []string{"10.0.0.1"}, Searches: []string{"a.test"}, Options: []string{"ndots:5"}},
		PortMappings: []*runtimeapi.PortMapping{
			{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"},
			{Protocol: runtimeapi.Protocol_UDP, ContainerPort: 53}},
		Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/burstable", Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "80", "kernel/shmmax": "1000"},
			Overhead:  &runtimeapi.LinuxContainerResources{CpuShares: 10, MemoryLimitInBytes: 1 << 20},
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 100, MemoryLimitInBytes: 1 << 26},
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER,
					UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}},
				RunAsUser: &runtimeapi.Int64Value{Value: 1000}, RunAsGroup: &runtimeapi.Int64Value{Value: 1000}, SupplementalGroups: []int64{5},
				SupplementalGroupsPolicy: runtimeapi.SupplementalGroupsPolicy_Strict, ReadonlyRootfs: true, Privileged: true,
				Seccomp:  &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
				Apparmor: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}},
		},
	}
}

func FuzzRunPodSandbox(f *testing.F) {
	full, shared := fullPod(), fullPod()
	shared.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Ipc: runtimeapi.NamespaceMode_NODE,
		UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: []*runtimeapi.IDMapping{{HostId: 1, Length: 5}}}}
	shared.Linux.Sysctls, shared.PortMappings = nil, nil
	fuzzUnary(f, (*Service).RunPodSandbox, &runtimeapi.RunPodSandboxRequest{Config: full},
		&runtimeapi.RunPodSandboxRequest{Config: shared, RuntimeHandler: "none"}, &runtimeapi.RunPodSandboxRequest{Config: shared})
}

func FuzzStopPodSandbox(f *testing.F) {
	fuzzUnary(f, (*Service).StopPodSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: readyPod})
}

func FuzzRemovePodSandbox(f *testing.F) {
	fuzzUnary(f, (*Service).RemovePodSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: readyPod})
}

func FuzzPodSandboxStatus(f *testing.F) {
	fuzzUnary(f, (*Service).PodSandboxStatus, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: readyPod, Verbose: true})
}

func podFilter() *runtimeapi.PodSandboxFilter {
	return &runtimeapi.PodSandboxFilter{Id: readyPod, State: &runtimeapi.PodSandboxStateValue{}, LabelSelector: map[string]string{"app": "fuzz"}}
}

func FuzzListPodSandbox(f *testing.F) {
	fuzzUnary(f, (*Service).ListPodSandbox, &runtimeapi.ListPodSandboxRequest{Filter: podFilter()})
}

func FuzzStreamPodSandboxes(f *testing.F) {
	fuzzStream(f, (*Service).StreamPodSandboxes, &runtimeapi.StreamPodSandboxesRequest{Filter: podFilter()})
}

func FuzzUpdatePodSandboxResources(f *testing.F) {
	fuzzUnary(f, (*Service).UpdatePodSandboxResources, &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: readyPod,
		Overhead: &runtimeapi.LinuxContainerResources{CpuShares: 5}, Resources: fullResources()})
}

func fullResources() *runtimeapi.LinuxContainerResources {
	return &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 1 << 26, OomScoreAdj: 900,
		CpusetCpus: "0", CpusetMems: "0", HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1 << 21}},
		Unified: map[string]string{"memory.high": "1000000", "io.weight": "default 100"}, MemorySwapLimitInBytes: 1 << 27}
}

// fullContainer has a value in every field of a container that a rootless node can honour.
func fullContainer() *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "full", Attempt: 1}, Image: &runtimeapi.ImageSpec{Image: testImage},
		Command: []string{"/bin/sh"}, Args: []string{"-c", "true"}, WorkingDir: "/srv", LogPath: "full/0.log", Stdin: true, StdinOnce: true, Tty: true,
		Envs: []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff}}},
		Mounts: []*runtimeapi.Mount{
			{ContainerPath: "/ro", HostPath: "/usr", Readonly: true, RecursiveReadOnly: true},
			{ContainerPath: "/shared", HostPath: "/tmp", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
			{ContainerPath: "/image", Image: &runtimeapi.ImageSpec{Image: testImage}, ImageSubPath: "etc"}},
		Devices: []*runtimeapi.Device{{HostPath: "/dev/null", ContainerPath: "/dev/nothing", Permissions: "rwm"}},
		Labels:  map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"}, StopSignal: runtimeapi.Signal_SIGNAL_SIGUSR1,
		Linux: &runtimeapi.LinuxContainerConfig{Resources: fullResources(), SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			Capabilities:     &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"CHOWN"}},
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			RunAsUser:        &runtimeapi.Int64Value{Value: 1000}, RunAsGroup: &runtimeapi.Int64Value{Value: 1000}, ReadonlyRootfs: true,
			SupplementalGroups: []int64{5}, NoNewPrivs: true, MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			Seccomp:  &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
			Apparmor: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}}},
	}
}

func FuzzCreateContainer(f *testing.F) {
	other := proto.CloneOf(fullContainer())
	security := other.Linux.SecurityContext
	security.RunAsUser, security.RunAsGroup, security.RunAsUsername = nil, nil, "root"
	security.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: runningContainer}
	security.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/etc/hostname"}
	security.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0"}
	other.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.test/device=one"}}
	fuzzUnary(f, (*Service).CreateContainer, &runtimeapi.CreateContainerRequest{PodSandboxId: readyPod, Config: fullContainer(), SandboxConfig: fullPod()},
		&runtimeapi.CreateContainerRequest{PodSandboxId: readyPod, Config: other})
}

func FuzzStartContainer(f *testing.F) {
	fuzzUnary(f, (*Service).StartContainer, &runtimeapi.StartContainerRequest{ContainerId: createdContainer}, &runtimeapi.StartContainerRequest{ContainerId: runningContainer})
}

func FuzzStopContainer(f *testing.F) {
	fuzzUnary(f, (*Service).StopContainer, &runtimeapi.StopContainerRequest{ContainerId: runningContainer, Timeout: 1},
		&runtimeapi.StopContainerRequest{ContainerId: runningContainer, Timeout: -1}, &runtimeapi.StopContainerRequest{ContainerId: createdContainer, Timeout: 1 << 62})
}

func FuzzRemoveContainer(f *testing.F) {
	fuzzUnary(f, (*Service).RemoveContainer, &runtimeapi.RemoveContainerRequest{ContainerId: runningContainer}, &runtimeapi.RemoveContainerRequest{ContainerId: createdContainer})
}

func containerFilter() *runtimeapi.ContainerFilter {
	return &runtimeapi.ContainerFilter{Id: runningContainer, PodSandboxId: readyPod, State: &runtimeapi.ContainerStateValue{}, LabelSelector: map[string]string{"a": "b"}}
}

func FuzzListContainers(f *testing.F) {
	fuzzUnary(f, (*Service).ListContainers, &runtimeapi.ListContainersRequest{Filter: containerFilter()})
}

func FuzzStreamContainers(f *testing.F) {
	fuzzStream(f, (*Service).StreamContainers, &runtimeapi.StreamContainersRequest{Filter: containerFilter()})
}

func FuzzContainerStatus(f *testing.F) {
	fuzzUnary(f, (*Service).ContainerStatus, &runtimeapi.ContainerStatusRequest{ContainerId: runningContainer, Verbose: true})
}

func FuzzUpdateContainerResources(f *testing.F) {
	fuzzUnary(f, (*Service).UpdateContainerResources, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: runningContainer, Linux: fullResources()},
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: createdContainer, Linux: fullResources(), Annotations: map[string]string{"a": "b"}})
}

func FuzzReopenContainerLog(f *testing.F) {
	fuzzUnary(f, (*Service).ReopenContainerLog, &runtimeapi.ReopenContainerLogRequest{ContainerId: createdContainer})
}

func FuzzExecSync(f *testing.F) {
	fuzzUnary(f, (*Service).ExecSync, &runtimeapi.ExecSyncRequest{ContainerId: createdContainer, Cmd: []string{"true"}, Timeout: 5},
		&runtimeapi.ExecSyncRequest{ContainerId: createdContainer, Cmd: []string{""}, Timeout: -5})
}

func FuzzExec(f *testing.F) {
	fuzzUnary(f, (*Service).Exec, &runtimeapi.ExecRequest{ContainerId: runningContainer, Cmd: []string{"sh"}, Tty: true, Stdin: true, Stdout: true},
		&runtimeapi.ExecRequest{ContainerId: runningContainer, Cmd: []string{"sh"}, Tty: true, Stderr: true})
}

func FuzzAttach(f *testing.F) {
	fuzzUnary(f, (*Service).Attach, &runtimeapi.AttachRequest{ContainerId: runningContainer, Stdin: true, Stdout: true, Stderr: true})
}

func FuzzPortForward(f *testing.F) {
	fuzzUnary(f, (*Service).PortForward, &runtimeapi.PortForwardRequest{PodSandboxId: readyPod, Port: []int32{80, -1, 1 << 20}})
}

func FuzzContainerStats(f *testing.F) {
	fuzzUnary(f, (*Service).ContainerStats, &runtimeapi.ContainerStatsRequest{ContainerId: runningContainer})
}

func statsFilter() *runtimeapi.ContainerStatsFilter {
	return &runtimeapi.ContainerStatsFilter{Id: runningContainer, PodSandboxId: readyPod, LabelSelector: map[string]string{"a": "b"}}
}

func FuzzListContainerStats(f *testing.F) {
	fuzzUnary(f, (*Service).ListContainerStats, &runtimeapi.ListContainerStatsRequest{Filter: statsFilter()})
}

func FuzzStreamContainerStats(f *testing.F) {
	fuzzStream(f, (*Service).StreamContainerStats, &runtimeapi.StreamContainerStatsRequest{Filter: statsFilter()})
}

func podStatsFilter() *runtimeapi.PodSandboxStatsFilter {
	return &runtimeapi.PodSandboxStatsFilter{Id: readyPod, LabelSelector: map[string]string{"app": "fuzz"}}
}

func FuzzPodSandboxStats(f *testing.F) {
	fuzzUnary(f, (*Service).PodSandboxStats, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: readyPod})
}

func FuzzListPodSandboxStats(f *testing.F) {
	fuzzUnary(f, (*Service).ListPodSandboxStats, &runtimeapi.ListPodSandboxStatsRequest{Filter: podStatsFilter()})
}

func FuzzStreamPodSandboxStats(f *testing.F) {
	fuzzStream(f, (*Service).StreamPodSandboxStats, &runtimeapi.StreamPodSandboxStatsRequest{Filter: podStatsFilter()})
}

func FuzzCheckpointContainer(f *testing.F) {
	fuzzUnary(f, (*Service).CheckpointContainer, &runtimeapi.CheckpointContainerRequest{ContainerId: runningContainer, Location: "/tmp/x.tar", Timeout: 5})
}

func FuzzCheckpointPod(f *testing.F) {
	fuzzUnary(f, (*Service).CheckpointPod, &runtimeapi.CheckpointPodRequest{PodSandboxId: readyPod, OutputPath: "/tmp/x", ContainerIds: []string{runningContainer}})
}

func FuzzRestorePod(f *testing.F) {
	fuzzUnary(f, (*Service).RestorePod, &runtimeapi.RestorePodRequest{CheckpointPath: "/tmp/x", Config: fullPod(), ContainerConfigs: []*runtimeapi.ContainerConfig{fullContainer()}})
}

func FuzzGetContainerEvents(f *testing.F) { fuzzStream(f, (*Service).GetContainerEvents) }

func FuzzListMetricDescriptors(f *testing.F) { fuzzUnary(f, (*Service).ListMetricDescriptors) }

func FuzzListPodSandboxMetrics(f *testing.F) { fuzzUnary(f, (*Service).ListPodSandboxMetrics) }

func FuzzStreamPodSandboxMetrics(f *testing.F) { fuzzStream(f, (*Service).StreamPodSandboxMetrics) }
