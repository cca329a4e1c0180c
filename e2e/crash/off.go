//go:build !faults

package crash

// Point is a place between two steps that change something.
func Point(string) {}
