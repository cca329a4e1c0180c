#!/bin/bash
# Looks for known vulnerabilities in what both programs call: `vuln.sh GOVULNCHECK TAGS`. Where the database cannot be
# reached it says so and fails: not to have looked is no result. GOVULNDB names another database, as a copy on disk
# (file:///path/to/vulndb, from https://vuln.go.dev/vulndb.zip).
set -euo pipefail
. "$(dirname "$0")/lib.sh"

db=${GOVULNDB:-https://vuln.go.dev}
out=$(mktemp)
trap 'rm -f "$out"' EXIT
code=0
PATH="$("$REPO/scripts/go" env GOROOT)/bin:$PATH" "$1" -db "$db" -tags "$2" ./... >"$out" 2>&1 || code=$?
cat "$out"
case $code in
0) ;;
3) die "there are vulnerabilities that coracle's code reaches: see above" ;;
*)
	! grep -q 'fetching vulnerabilities' "$out" || die "the database $db cannot be reached from here, so nothing was looked for." \
		"Where it can be: make vuln. With a copy of it: GOVULNDB=file:///path/to/vulndb make vuln"
	die "govulncheck ended with code $code"
	;;
esac
