package main

// row is one line of the table.
type row struct {
	key  string
	unit string
	more bool    // the larger figure is the better one
	aim  float64 // how many times better than the peer; 0 = none
	most float64 // or the value that is not to be passed; with more: that is to be reached
}

// The rows beside those of a pod's life, by section.
const (
	rowCold      = "cold start of the node to its first answer"
	rowIdle      = "idle node, all processes, PSS"
	rowSeccomp   = "RunPodSandbox to running, RuntimeDefault seccomp"
	rowFilter    = "of it what the seccomp filter takes"
	rowFifty     = "50 pods, 10 at once, until all run"
	rowFiftyCPU  = "CPU time a pod, 50 pods 10 at once"
	rowFiftyEnd  = "50 pods, 10 at once, until all are removed"
	rowPodPSS    = "memory a pod of 500 beyond its workload, all processes, PSS"
	rowRestart   = "daemon killed, with 50 pods, to its next answer"
	rowFirst     = "pods 5 to 15, one after another, to running"
	rowLast      = "pods 490 to 500, to running"
	rowGrowth    = "the latter against the former"
	rowSix       = "pull of 118 MB in 6 layers"
	rowSixCPU    = "CPU time of it"
	rowSixMem    = "memory of it at its peak"
	rowOne       = "pull of 1 layer of 100 MB"
	rowOneCPU    = "CPU time of that"
	rowOneMem    = "memory of that at its peak"
	rowStream    = "exec stdout to a client"
	rowStreamCPU = "CPU time of the node for 1 GiB of it"
	rowLog       = "log of lines of 100 bytes"
	rowLogCPU    = "CPU time of the node for 1 GB of them"
)

// table is all rows, in the order in which they are printed.
func table() []row {
	return []row{
		{key: rowSandbox, unit: "ms"}, {key: rowCreate, unit: "ms"}, {key: rowStart, unit: "ms"},
		{key: rowRunning, unit: "ms", aim: 8}, {key: rowSeccomp, unit: "ms", aim: 8},
		{key: rowFilter, unit: "ms", most: 2},
		{key: rowExec, unit: "ms", aim: 2.5}, {key: rowRemoved, unit: "ms", aim: 10},
		{key: rowFifty, unit: "ms", aim: 6}, {key: rowFiftyCPU, unit: "ms", aim: 8}, {key: rowFiftyEnd, unit: "ms"},
		{key: rowIdle, unit: "KiB", most: 30 << 10}, {key: rowPodPSS, unit: "KiB", most: 120},
		{key: rowRestart, unit: "ms", most: 60}, {key: rowCold, unit: "ms", aim: 1},
		{key: rowSix, unit: "ms", aim: 1.7}, {key: rowSixCPU, unit: "ms", aim: 1}, {key: rowSixMem, unit: "KiB", most: 60 << 10},
		{key: rowOne, unit: "ms", aim: 1.3}, {key: rowOneCPU, unit: "ms", aim: 1}, {key: rowOneMem, unit: "KiB", most: 60 << 10},
		{key: listRow("ListPodSandbox", 50), unit: "ms", most: 1}, {key: listRow("ListContainers", 50), unit: "ms", most: 1},
		{key: listRow("PodSandboxStatus", 50), unit: "ms", most: 1}, {key: listRow("ContainerStatus", 50), unit: "ms", most: 1},
		{key: listRow("ListContainerStats", 50), unit: "ms", most: 3}, {key: listRow("ListPodSandboxStats", 50), unit: "ms"},
		{key: listRow("ListPodSandbox", 500), unit: "ms", most: 5}, {key: listRow("ListContainers", 500), unit: "ms", most: 5},
		{key: listRow("PodSandboxStatus", 500), unit: "ms", most: 5}, {key: listRow("ContainerStatus", 500), unit: "ms", most: 5},
		{key: listRow("ListContainerStats", 500), unit: "ms"}, {key: listRow("ListPodSandboxStats", 500), unit: "ms"},
		{key: rowFirst, unit: "ms"}, {key: rowLast, unit: "ms"}, {key: rowGrowth, unit: "×", most: 1.3},
		{key: rowStream, unit: "MB/s", more: true, most: 1000}, {key: rowStreamCPU, unit: "ms"},
		{key: rowLog, unit: "MB/s", more: true, most: 300}, {key: rowLogCPU, unit: "ms"},
	}
}

// better is how many times better ours is than theirs.
func (r row) better(ours, theirs float64) float64 {
	if r.more {
		ours, theirs = theirs, ours
	}
	return theirs / ours
}

// met tells whether the row's aim is reached.
func (r row) met(ours, theirs float64) bool {
	switch {
	case r.most != 0 && r.more:
		return ours >= r.most
	case r.most != 0:
		return ours <= r.most
	default:
		return r.better(ours, theirs) >= r.aim
	}
}
