// Package threads keeps threads in store. A Go program that cannot get a thread when it wants one ends at once
// (runtime.newosproc), and where a container has taken all the processes that the user may have, no more is to be had.
package threads

import (
	"runtime"
	"sync"
)

// Spare is how many each process of a node keeps.
const Spare = 16

// Keep makes threads until there are as many besides this one. The runtime never ends an idle thread, and makes a new one
// only where none is idle.
func Keep(count int) {
	var made, ended sync.WaitGroup
	all := make(chan struct{})
	for range count {
		made.Add(1)
		ended.Go(func() {
			runtime.LockOSThread() // held by all of them at once, so each has one of its own
			defer runtime.UnlockOSThread()
			made.Done()
			<-all
		})
	}
	made.Wait()
	close(all)
	ended.Wait()
}
