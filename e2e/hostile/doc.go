// Command hostile tries to get out of the container that it runs in, one way after another, and prints what came of
// each: the name of the attempt, "through" or "kept", and a detail, with tabs between. It harms nothing: where a way
// is open it stops at the door. With names of attempts as arguments it makes those alone. "greet SOCKET" tells whether
// a socket answers. Three things it does until it is ended: "bomb" forks until it may not, "bomb N" so by N user ids; "overwrite" writes to
// programs of the runtime that it meets; "exchange DIR" swaps DIR/a and DIR/b.
//
// What it is to look for on the host comes by the environment: see the constants. Which attempts may get through in
// which kind of pod is a table of the tests that run it.
package main
