package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// quietWatch is how long the machine is looked at before it is called quiet, and quietShare the part of its CPU time that
// others may use meanwhile.
const (
	quietWatch = time.Second
	quietShare = 0.05
)

// noise watches a machine on which nothing of ours runs and says what is going on there; "" when it is quiet.
func noise() string {
	busy0, all0 := cpuTimes()
	time.Sleep(quietWatch)
	busy1, all1 := cpuTimes()
	var why []string
	if share := (busy1 - busy0) / max(all1-all0, 1); share > quietShare {
		why = append(why, fmt.Sprintf("%.0f%% of the CPU time is used", share*100))
	}
	if waited := pressure("cpu"); waited > 5 {
		why = append(why, fmt.Sprintf("processes waited for a CPU in %.0f%% of the last 10 s", waited))
	}
	if waited := pressure("io"); waited > 5 {
		why = append(why, fmt.Sprintf("processes waited for a disk in %.0f%% of the last 10 s", waited))
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

// pressure is the share of the last ten seconds in which some process waited for a resource, in percent; 0 where the kernel
// does not tell.
func pressure(resource string) float64 {
	raw, _ := os.ReadFile("/proc/pressure/" + resource)
	_, rest, _ := strings.Cut(string(raw), "some avg10=")
	value, _, _ := strings.Cut(rest, " ")
	v, _ := strconv.ParseFloat(value, 64)
	return v
}
