#!/bin/bash
# Looks for known vulnerabilities in what both programs call: `vuln.sh GOVULNCHECK TAGS`. The database is vuln.go.dev;
# where that cannot be reached, it is made of the Go module that vuln.go.dev itself is made of, golang.org/x/vulndb, in its newest
# version. GOVULNDB names another one, as a copy on disk (file:///path/to/vulndb, from https://vuln.go.dev/vulndb.zip).
# Where there is none at all it says so and fails: not to have looked is no result.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

go=$REPO/scripts/go cache=$REPO/.cache/vulndb
reports=golang.org/x/vulndb

# from_module makes the database of the newest version of the module, once, and prints its place.
from_module() {
	local version dir
	version=$(cd / && "$go" list -m -f '{{.Version}}' "$reports@latest") || return 1
	if [ ! -d "$cache/$version" ]; then
		dir=$(cd / && "$go" mod download -json "$reports@$version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p') || return 1
		rm -rf "$cache" && mkdir -p "$cache"
		(cd / && "$go" run "$reports/cmd/indexdb@$version" -vulns "$dir/data/osv" -out "$cache/new") >&2 || return 1
		mv "$cache/new" "$cache/$version"
	fi
	say "the database is of $reports $version: vuln.go.dev cannot be reached from here" >&2
	echo "file://$cache/$version"
}

# check looks in the database $1, and leaves the exit code in code.
check() {
	code=0
	PATH="$("$go" env GOROOT)/bin:$PATH" "$govulncheck" -db "$1" -tags "$tags" ./... >"$out" 2>&1 || code=$?
}

govulncheck=$1 tags=$2
out=$(mktemp)
trap 'rm -f "$out"' EXIT
check "${GOVULNDB:-https://vuln.go.dev}"
if [ -z "${GOVULNDB:-}" ] && grep -q 'fetching vulnerabilities' "$out"; then
	db=$(from_module) || die "neither vuln.go.dev nor the module $reports can be reached from here, so nothing was looked for." \
		"Where one can be: make vuln. With a copy of it: GOVULNDB=file:///path/to/vulndb make vuln"
	check "$db"
fi
cat "$out"
case $code in
0) ;;
3) die "there are vulnerabilities that coracle's code reaches: see above" ;;
*) die "govulncheck ended with code $code" ;;
esac
