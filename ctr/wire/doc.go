// Package wire is the boundary between the daemon and the keeper: every message that crosses it, and the framing.
//
// Nouns: Request (what the daemon asks), Reply (what the keeper answers), State (a container's facts), Event (what
// a daemon missed or now learns), Conn (one call: frames, and the descriptors that ride with them).
//
// One stream connection on a unix socket carries one call. A frame is four bytes of length, big endian, and that
// much JSON; descriptors ride with the first byte of the frame by SCM_RIGHTS. Closing the connection, or
// its sending half, gives the call up: an exec is killed then, an attach cut off.
//
//	caller                                keeper
//	  |  Request (+ fds of exec, attach)    |
//	  |------------------------------------>|
//	  |  Reply                              |   info, create, start, kill, delete, list, resize,
//	  |<------------------------------------|   reopenlog, update, restart, shutdown: one reply, the end
//	  |                                     |
//	  |  Reply of the new program, or of    |   replace
//	  |  the old one where it goes on       |
//	  |<------------------------------------|
//	  |                                     |
//	  |  Reply "it runs" (+ fd of its tty)  |   exec
//	  |<------------------------------------|
//	  |  Reply with the exit code           |
//	  |<------------------------------------|
//	  |                                     |
//	  |  Reply "attached", Reply "ended"    |   attach
//	  |<------------------------------------|
//	  |                                     |
//	  |  Reply "subscribed", Reply+Event…   |   events, until the caller goes
//	  |<------------------------------------|
//
// The package owns no state and takes no lock.
package wire
