package netslirp

import "errors"

var (
	// ErrInvalid marks a request that cannot be right: a bad address, port, protocol or name.
	ErrInvalid = errors.New("invalid network request")
	// ErrUnsupported marks a request that is right but that a rootless node cannot serve.
	ErrUnsupported = errors.New("not supported")
	// ErrPortInUse marks a host port that a pod or another program of the host has.
	ErrPortInUse = errors.New("host port is in use")
	// ErrPortReserved marks a host port that this user may not bind.
	ErrPortReserved = errors.New("host port is reserved for root")
	// ErrNoAddress marks a pod CIDR without a free address.
	ErrNoAddress = errors.New("no free pod address")
	// ErrAttached marks a pod that has its network already.
	ErrAttached = errors.New("pod is attached already")
	// ErrBusy marks a pod whose network another call is changing.
	ErrBusy = errors.New("another network operation of this pod is under way")
	// ErrClosed marks a call after Close.
	ErrClosed = errors.New("network is closed")
)
