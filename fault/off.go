//go:build !faults

package fault

// Point is a place between two steps that change something.
func Point(string) {}
