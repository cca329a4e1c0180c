package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// quietWatch is how long the machine is looked at before it is called quiet, and quietShare the part of that time in
// which others may use its CPUs, or wait for them or for a disk.
const (
	quietWatch = time.Second
	quietShare = 0.05
)

// noise watches a machine on which nothing of ours runs and says what is going on there; "" when it is quiet. The kernel's
// own averages of pressure (avg10) would still tell of what ran here before.
func noise() string {
	began, cpu0, disk0 := time.Now(), waited("cpu"), waited("io")
	busy0, all0 := cpuTimes()
	time.Sleep(quietWatch)
	busy1, all1 := cpuTimes()
	passed := time.Since(began).Seconds()
	var why []string
	for _, share := range []struct {
		what string
		of   float64
	}{
		{"%.0f%% of the CPU time is used", (busy1 - busy0) / max(all1-all0, 1)},
		{"processes wait for a CPU in %.0f%% of the time", (waited("cpu") - cpu0) / passed},
		{"processes wait for a disk in %.0f%% of the time", (waited("io") - disk0) / passed},
	} {
		if share.of > quietShare {
			why = append(why, fmt.Sprintf(share.what, share.of*100))
		}
	}
	if len(why) == 0 {
		return ""
	}
	raw, _ := os.ReadFile("/proc/loadavg")
	return strings.Join(why, ", ") + "; load " + strings.Join(strings.Fields(string(raw))[:3], " ")
}

// cpuTimes reads the first line of /proc/stat, in ticks.
func cpuTimes() (busy, all float64) {
	raw, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(raw), "\n")
	for i, f := range strings.Fields(line) {
		v, err := strconv.ParseFloat(f, 64)
		if err != nil || i > 8 {
			continue // the name, and guests' time, which is part of user's
		}
		all += v
		if i != 4 && i != 5 { // idle, iowait
			busy += v
		}
	}
	return busy, all
}

// waited is how long, since the machine started, some process waited for a resource, in seconds; 0 where the kernel does
// not tell.
func waited(resource string) float64 {
	raw, _ := os.ReadFile("/proc/pressure/" + resource)
	line, _, _ := strings.Cut(string(raw), "\n") // "some avg10=… total=…", in microseconds
	_, total, _ := strings.Cut(line, "total=")
	usec, _ := strconv.ParseFloat(total, 64)
	return usec / 1e6
}
