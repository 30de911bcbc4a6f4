#!/bin/bash
# Hosts with shaped links on this one machine, to time communication on real sockets. Root, Linux; Debian: apt install iproute2
#
#     benchmarks/links/network.sh up --hosts 8 --rate 1gbit [--delay 0.1ms]       until `down`
#     benchmarks/links/network.sh down
#     benchmarks/links/network.sh with --hosts 8 --rate 1gbit [--delay 0.1ms] -- COMMAND...
#
# Host i is the network namespace slowmo<i>, its device eth0, its address 10.77.0.<i>; `ip netns exec slowmo1 COMMAND` runs there. All
# hang on one switch, a bridge in slowmosw. A link is full duplex: tbf shapes what a host sends on its own device and what it
# receives on the switch's port. --delay: one way from host to host; delay_wire.c makes it (not every kernel has netem), which takes cc.
# `with` works in namespaces of its own, which the kernel takes away when COMMAND ends, however it ends: two of them never meet.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
state=/run/slowmo_network # wire: the delay's process; facts: what is up
fail() { echo "network: $*" >&2; exit 2; }
usage="usage: benchmarks/links/network.sh up|with --hosts M --rate 1gbit [--delay 0.1ms] [-- COMMAND...] | down"

down() {
    if [ -s $state/wire ] && [ "$(cat "/proc/$(cat $state/wire)/comm" 2>/dev/null)" = delay_wire ]; then kill "$(cat $state/wire)"; fi
    rm -rf $state/*
    for space in $(ip netns list | awk '$1 ~ /^slowmo([0-9]+|sw)$/ {print $1}'); do ip netns del "$space"; done
}

up() {
    ! ip netns list | grep -q '^slowmosw\b' || fail "a network is up already: benchmarks/links/network.sh down"
    trap 'down; fail "could not bring the network up, and took away what there was"' ERR
    trap 'down; exit 130' INT TERM
    mkdir -p $state
    ip netns add slowmosw
    ip -n slowmosw link set lo up
    ip -n slowmosw link add switch type bridge
    ip -n slowmosw link set switch up
    for i in $(seq 1 "$hosts"); do
        ip netns add "slowmo$i"
        ip -n "slowmo$i" link set lo up
    done
    if [ "$nanoseconds" = 0 ]; then
        for i in $(seq 1 "$hosts"); do ip link add eth0 netns "slowmo$i" type veth peer name "port$i" netns slowmosw; done
    else
        local wires=()
        cc -O2 -o $state/delay_wire "$here/delay_wire.c"
        for i in $(seq 1 "$hosts"); do wires+=("slowmo$i" eth0 slowmosw "port$i"); done
        # two wires lie between two hosts; a real-time priority keeps the delay to the microseconds
        setsid $state/delay_wire $((nanoseconds / 2)) "${wires[@]}" >$state/ready 2>&1 </dev/null &
        echo $! >$state/wire
        chrt -f -p 10 $! 2>/dev/null || true
        for _ in $(seq 1 100); do [ -s $state/ready ] && break || sleep 0.05; done
        grep -q ready $state/ready || { cat $state/ready >&2; false; }
    fi
    for i in $(seq 1 "$hosts"); do
        ip -n "slowmo$i" addr add "10.77.0.$i/24" dev eth0
        ip -n "slowmo$i" link set eth0 up txqueuelen 1000
        # by route: a namespace may not choose a congestion control otherwise
        ip -n "slowmo$i" route change 10.77.0.0/24 dev eth0 proto kernel scope link src "10.77.0.$i" congctl reno
        ip -n slowmosw link set "port$i" master switch up
        # a burst smaller than a timer tick's bytes, or than one segment of 64 KB, would slow large rates down
        tc -n "slowmo$i" qdisc add dev eth0 root tbf rate "$rate" burst 128kb limit 1mb
        tc -n slowmosw qdisc add dev "port$i" root tbf rate "$rate" burst 128kb limit 1mb
    done
    echo "$hosts $rate $delay" >$state/facts
    trap - ERR INT TERM
}

[ $# -ge 1 ] || fail "$usage"
verb=$1
shift
hosts= rate= delay=0ms
while [ $# -gt 0 ]; do
    case $1 in
    --hosts) hosts=${2-} ;;
    --rate) rate=${2-} ;;
    --delay) delay=${2-} ;;
    --) break ;;
    *) fail "unknown word $1; $usage" ;;
    esac
    shift $(($# > 1 ? 2 : 1))
done
[ "$(id -u)" = 0 ] || fail "namespaces want root"
for tool in ip tc unshare; do command -v $tool >/dev/null || fail "$tool is missing. On Debian and Ubuntu: apt install iproute2 util-linux"; done
if [ "$verb" = down ]; then
    down
    exit
fi
[ "$verb" = up ] || [ "$verb" = with ] || fail "$usage"
[[ $hosts =~ ^[0-9]+$ ]] && [ "$hosts" -ge 2 ] && [ "$hosts" -le 250 ] || fail "--hosts $hosts: a whole number from 2 to 250"
[[ $rate =~ ^[0-9]+([.][0-9]+)?[kmg]bit$ ]] || fail "--rate $rate: a rate like 200mbit or 1gbit"
[[ $delay =~ ^[0-9]+([.][0-9]+)?(us|ms)$ ]] || fail "--delay $delay: a time like 0.1ms or 100us"
nanoseconds=$(awk -v delay="$delay" 'BEGIN { printf "%.0f", delay * (delay ~ /ms/ ? 1000000 : 1000) }')
if [ "$nanoseconds" != 0 ]; then
    [ -c /dev/net/tun ] && command -v cc >/dev/null || fail "--delay wants a C compiler and /dev/net/tun. On Debian and Ubuntu: apt install gcc libc6-dev"
fi
if [ "$verb" = up ]; then
    up
    exit
fi
[ "${1-}" = -- ] && [ $# -gt 1 ] || fail "with what? $usage"
shift
export -f up down fail
export here state hosts rate delay nanoseconds
mkdir -p /run/netns $state
unshare --net --mount --pid --fork --kill-child --mount-proc bash -euo pipefail -c '
    mount -t tmpfs tmpfs /run/netns
    mount -t tmpfs tmpfs $state
    ip link set lo up
    up
    "$@"' with "$@" <&0 &
trap 'kill -KILL $! 2>/dev/null; exit 143' TERM # unshare does not hear it
trap 'kill -KILL $! 2>/dev/null; exit 130' INT
wait $!
