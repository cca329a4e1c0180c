package ctr

import "errors"

var (
	// ErrInvalid marks a request that no node could serve: a field that contradicts another, a path that does
	// not exist, an unknown name. The CRI answers InvalidArgument.
	ErrInvalid = errors.New("invalid container configuration")

	// ErrUnsupported marks a request that is sound and that this node refuses, because its kernel, its user
	// namespace or its policy "strict" does not allow it. The CRI answers FailedPrecondition.
	ErrUnsupported = errors.New("not supported by this node")
)
