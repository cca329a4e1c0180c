package ctr

import (
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The real-time signals as C libraries number them: the kernel's first two are theirs.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// signalAliases are names that golang.org/x/sys does not know, because another has the same number.
var signalAliases = map[string]syscall.Signal{
	"SIGCLD": unix.SIGCHLD, "SIGIOT": unix.SIGABRT, "SIGPOLL": unix.SIGIO, "SIGUNUSED": unix.SIGSYS,
}

// StopSignal returns the signal that stops a container: the container's, else the image's STOPSIGNAL ("SIGQUIT",
// "QUIT", "3" or "SIGRTMIN+3"), else SIGTERM.
func StopSignal(container runtimeapi.Signal, image string) (syscall.Signal, error) {
	if container != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		// The enum's numbers are its own; only its names are signals: SIGNAL_SIGRTMINPLUS3.
		name := strings.TrimPrefix(container.String(), "SIGNAL_")
		name = strings.NewReplacer("MINPLUS", "MIN+", "MAXMINUS", "MAX-").Replace(name)
		return parseSignal(name)
	}
	if image = strings.TrimSpace(image); image == "" {
		return unix.SIGTERM, nil
	}
	return parseSignal(image)
}

func parseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > sigRTMax {
			return 0, invalid("stop signal %d: signals are 1 to %d", n, sigRTMax)
		}
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	if sig, ok := signalAliases[name]; ok {
		return sig, nil
	}
	if sig, ok := realTimeSignal(name); ok {
		return sig, nil
	}
	return 0, invalid("stop signal %q is unknown", s)
}

func realTimeSignal(name string) (syscall.Signal, bool) {
	base, offset := sigRTMin, ""
	switch {
	case strings.HasPrefix(name, "SIGRTMIN"):
		offset = strings.TrimPrefix(name, "SIGRTMIN")
	case strings.HasPrefix(name, "SIGRTMAX"):
		base, offset = sigRTMax, strings.TrimPrefix(name, "SIGRTMAX")
	default:
		return 0, false
	}
	if offset == "" {
		return syscall.Signal(base), true
	}
	n, err := strconv.Atoi(offset) // "+3" and "-3"
	if err != nil || offset[0] != '+' && offset[0] != '-' {
		return 0, false
	}
	if n += base; n < sigRTMin || n > sigRTMax {
		return 0, false
	}
	return syscall.Signal(n), true
}
