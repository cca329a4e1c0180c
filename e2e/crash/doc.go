// Package crash gives names to the places at which the death of the daemon would matter, so that a test can have it die at
// each of them. In every program that is not built with the tag "faults" a Point is nothing, and its name is nowhere.
package crash
