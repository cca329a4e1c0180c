#!/bin/bash
# Prints the version of this checkout: the last tag with what came after it, else 0.1.0-dev and the revision.
cd "$(dirname "$0")/.." || exit 1
# The checkout may belong to somebody else (root runs the tests in a user's clone): it is only read.
of_git() { git -c safe.directory='*' "$@" 2>/dev/null; }
if version=$(of_git describe --tags --match 'v[0-9]*' --dirty); then
	echo "${version#v}"
elif revision=$(of_git rev-parse --short=12 HEAD); then
	echo "0.1.0-dev+g$revision"
else
	echo 0.1.0-dev
fi
