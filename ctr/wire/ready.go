package wire

// ReadyEnv names the descriptor, a pipe's, on which a daemon tells the keeper, in one line, that it serves, or why it does
// not: ReadyServing, or a sentence.
const (
	ReadyEnv     = "_CORACLE_READY_FD"
	ReadyServing = "serving"
)
