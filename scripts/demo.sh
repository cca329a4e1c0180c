#!/bin/bash
# Starts a node of its own, pulls an image from a loopback registry, runs a pod from it and shows what a user would
# look at; then takes everything away. Started by `make demo`, as an ordinary user, after the programs are built.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

bin=$REPO/.cache/bin
work=$(mktemp -d /tmp/coracle-demo.XXXXXX)
export PATH=$REPO/bin:$bin:$PATH XDG_DATA_HOME=$work/data CRI_CONFIG_FILE=$work/crictl.yaml CORACLE_NAME=demo

if [ -t 1 ]; then bold=$(tput bold 2>/dev/null || true) plain=$(tput sgr0 2>/dev/null || true); else bold='' plain=''; fi

step() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

# show prints a command as a user would type it, and runs it.
show() {
	local word line=
	for word; do
		case $word in
		*[\ \$]*) line+=" '$word'" ;;
		*) line+=" $word" ;;
		esac
	done
	printf '  $%s\n' "$line"
	"$@" 2>&1 | sed 's/^/  /'
}

clean_up() {
	local code=$?
	trap - EXIT
	[ -z "${forward:-}" ] || kill "$forward" 2>/dev/null || true
	[ ! -e "$work/up" ] || coracle down --grace 0s >/dev/null || code=1
	[ -z "${registry:-}" ] || kill "$registry" 2>/dev/null || true
	# The store holds read-only directories, and may hold files of subordinate ids.
	chmod -R u+w "$work" 2>/dev/null || true
	rm -rf "$work" 2>/dev/null || loopback -remove "$work" || code=1
	exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

mkdir -p "$bin" "$work/data"
export GOTMPDIR=$REPO/.cache/tmp GOFLAGS=-buildvcs=false
mkdir -p "$GOTMPDIR"
(cd "$REPO" && scripts/go build -trimpath -o "$bin/loopback" ./e2e/loopback && scripts/go build -trimpath -o "$bin/bench" ./e2e/bench)
echo 'timeout: 30' >"$CRI_CONFIG_FILE"

# serve starts the registry and waits for the name of its image. It ends with its standard input.
serve() {
	mkfifo "$work/open"
	loopback <"$work/open" >"$work/image" &
	registry=$!
	exec 7>"$work/open"
	until [ -s "$work/image" ]; do
		kill -0 "$registry" 2>/dev/null || die "the registry does not start"
		sleep 0.05
	done
	image=$(cat "$work/image")
}

up() {
	: >"$work/up"
	coracle up --detach >"$work/up" || die "the node does not start"
	eval "$(grep -o 'export CONTAINER_RUNTIME_ENDPOINT=[^ ]*' "$work/up")"
}

printf '%scoracle %s%s: pods for %s (uid %s), without root and without a container engine\n' "$bold" "$(coracle version | cut -d' ' -f2)" "$plain" "$(id -un)" "$(id -u)"

step "A node, in user namespaces of your own"
printf '  $ coracle up --detach\n'
up
sed '/^$/d; s/^/  /' "$work/up"

step "An image, built on the spot, from a registry on loopback"
serve
show crictl pull "$image"
show crictl images

step "A pod, through the CRI"
cat >"$work/pod.json" <<END
{"metadata": {"name": "hello", "namespace": "demo", "uid": "1"}, "hostname": "hello", "log_directory": "$work/logs", "linux": {}}
END
cat >"$work/container.json" <<END
{"metadata": {"name": "web"}, "labels": {"io.kubernetes.pod.name": "hello", "io.kubernetes.pod.namespace": "demo"}, "image": {"image": "$image"}, "log_path": "web.log", "linux": {}}
END
printf '  $ crictl runp pod.json; crictl create POD container.json pod.json; crictl start CONTAINER\n'
# crictl warns that the configuration names no parent cgroup: a kubelet would, here the node chooses.
pod=$(crictl runp "$work/pod.json" 2>"$work/errors") || die "$(cat "$work/errors")"
container=$(crictl create "$pod" "$work/container.json" "$work/pod.json" 2>"$work/errors") || die "$(cat "$work/errors")"
crictl start "$container" >/dev/null
pod=${pod:0:13} container=${container:0:13}
show crictl pods
show crictl ps

step "A command in it"
show crictl exec "$container" sh -c 'echo "I am $(id -un) of $(hostname), pid $$ here"; ip -o -4 address show eth0 | cut -d" " -f2-7'

step "An HTTP answer through a port-forward"
printf '  $ crictl port-forward %s :8080\n' "$pod"
crictl port-forward "$pod" 0:8080 >"$work/forward" 2>&1 &
forward=$!
for _ in $(seq 100); do
	port=$(grep -o '127.0.0.1:[0-9]*' "$work/forward" | head -n1) && break
	sleep 0.05
done
[ -n "$port" ] || die "crictl port-forward does not start: $(cat "$work/forward")"
show curl -fsS "http://$port/"
kill "$forward"
wait "$forward" 2>/dev/null || true
forward=

step "Its log"
show crictl logs "$container"

step "How long it takes"
bench -image "$image" -count 20 | sed 's/^/  /'

step "Cleaning up"
show crictl rmp --force "$pod"
show crictl rmi "$image"
printf '  $ coracle down\n'
coracle down --grace 0s | sed 's/^/  /'
rm "$work/up"
