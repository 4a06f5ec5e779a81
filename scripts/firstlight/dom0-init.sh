#!/bin/busybox sh
# The first process of the Xen lab's dom0: starts Xen's services, runs the guests under /jobs one after the other and powers off.
# A guest's console goes to the second serial line. Lines of this script itself begin with "@@lab TAG"; everything
# between "begin" and "end" is the guest's own output. The first serial line has Xen's log, dom0's and xl's.
/bin/busybox --install -s /bin
export PATH=/sbin:/xen/bin:/bin LD_LIBRARY_PATH=/lib HOME=/

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm /run/xen /run/xenstored /var/lib/xenstored
mount -t devpts devpts /dev/pts
mount -t tmpfs -o size=90% tmpfs /tmp
echo 4 > /proc/sys/kernel/printk
ip link set lo up

line=/dev/ttyS1
stty -F $line raw -echo
exec 3> $line
. /jobs/common.sh
die() { say "broken $*"; sync; poweroff -f; }
milliseconds() { read -r up rest < /proc/uptime; echo "${up%.*}${up#*.}0"; }

# load LIST [PARAMETER...]: the modules of the file modules-LIST; the parameters are for the last one.
load() {
    list=$1
    shift
    last=$(tail -n 1 "/jobs/modules-$list")
    while read -r module; do
        if [ "$module" = "$last" ]; then
            insmod "/modules/$module" "$@" || die "module $module was not loaded with '$*'"
        else
            insmod "/modules/$module" || die "module $module was not loaded"
        fi
    done < "/jobs/modules-$list"
}

load dom0
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xenstored.pid
tries=0
until xenstore-exists / 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || die "xenstored does not answer"
    usleep 100000
done
xen-init-dom0 > /dev/null || die "xen-init-dom0 failed"
# xenconsoled writes the output of the guest of this name, in order, to this file: a FIFO, read by console() below.
mkfifo /console/guest-firstlight.log
ln -s guest-firstlight.log /console/guest-firstlight--incoming.log # its name while it is migrated to this same host
xenconsoled --pid-file=/run/xenconsoled.pid --log=guest --log-dir=/console

# attach NUMBER NAME SECTOR loop|ram [readonly]: the image in memory becomes /dev/loopNUMBER or /dev/ramNUMBER.
attach() {
    if [ "$4" = ram ]; then
        dd if="/tmp/$2" of="/dev/ram$1" bs=1M 2>/dev/null || die "disk $2: does not fit into /dev/ram$1"
        rm "/tmp/$2"
    else
        [ -b "/dev/loop$1" ] || mknod "/dev/loop$1" b 7 "$1"
        /sbin/losetup --sector-size "$3" ${5:+--read-only} "/dev/loop$1" "/tmp/$2" || die "disk $2: could not be attached to /dev/loop$1"
    fi
}

# write_through NUMBER: /dev/loopNUMBER says that it has no write cache. Then blkback offers neither flush nor barrier.
write_through() { echo "write through" > "/sys/block/loop$1/queue/write_cache" || die "/dev/loop$1: its cache could not be set"; }

# slow NUMBER IOPS: /dev/loopNUMBER does at most so many reads and so many writes a second, until the guest has ended (hurry). By the first version of
# control groups, whose root, which blkback's threads are in from their start, can have a limit.
group=/sys/fs/cgroup
slow() {
    [ -e "$group/tasks" ] || mount -t cgroup -o blkio blkio "$group" || die "no control groups"
    for way in read write; do
        echo "7:$1 $2" > "$group/blkio.throttle.${way}_iops_device" || die "/dev/loop$1: its rate could not be limited"
    done
}

# hurry: no loop device is limited any more. A limit is the block device's, and outlives the file that was attached to it.
hurry() {
    for way in read write; do
        file="$group/blkio.throttle.${way}_iops_device"
        [ -e "$file" ] || return 0
        for device in $(cut -d ' ' -f 1 "$file"); do echo "$device 0" > "$file"; done
        [ -z "$(cat "$file")" ] || die "a limit of a disk's rate could not be lifted"
    done
}

# bring_out DEVICE MEGABYTE: copy to the scratch disk, at that offset.
bring_out() {
    dd if="$1" of=/dev/vda bs=1M seek="$2" conv=notrunc,fsync 2>/dev/null || die "$1: could not be copied out"
}

# act_at_times: reads lines of microseconds and what is done after as many: a number of microseconds for which the guest is paused, or a command.
# A guest that has shut down cannot be paused: then nothing is printed, and the test that requested it fails.
act_at_times() {
    while read -r delay length; do
        usleep "$delay"
        case $length in
        *[!0-9]*)
            say "acting"
            output=$(sh -c "$length" 2>&1) || say "failed $length: $(echo "$output" | tail -n 3 | tr '\n' ' ')"
            continue
            ;;
        esac
        xl pause firstlight 2>/dev/null
        # Earlier output is passed on first: everything before this mark was printed before the pause.
        usleep 50000
        [ "$(xl list firstlight 2>/dev/null | awk 'NR == 2 && $5 ~ /p/ && $5 !~ /s/ { print "paused" }')" = paused ] && say "paused"
        usleep $((length - 50000))
        xl unpause firstlight 2>/dev/null
    done
}

# follow_suspended SECOND: a guest that has been suspended goes on, in the same domain or in another one, and no xl waits for its end. Until this
# second of dom0's time; sets found to the reason of its end.
follow_suspended() {
    while [ "$found" = 2 ] && [ $(($(milliseconds) / 1000)) -lt "$1" ]; do
        usleep 200000
        state=$(xl list -v firstlight 2>/dev/null | awk 'NR == 2 { print $5 ~ /s/ ? $8 : "" }')
        found=${state:-2}
    done
}

# guest SECONDS: runs a guest until it has shut down or the time is over; sets status and reason.
guest() {
    reason=none
    [ -e "$job/events" ] && { mkfifo /tmp/events; act_at_times < /tmp/events & actor=$!; }
    pass_on "$job/events" < /console/guest-firstlight.log >&3 &
    console=$!
    exec 4> /console/guest-firstlight.log # while a suspended guest is in no domain
    end=$(($(milliseconds) / 1000 + $1))
    # A domain that has shut down is kept (on_...="preserve"): its last output may still be in its console's ring, from which xenconsoled reads it.
    timeout "$1" xl create -F "$job/domain.cfg" > /tmp/xl.log 2>&1 < /dev/null 4>&-
    status=$?
    cat /tmp/xl.log
    found=$(sed -n 's/.*Domain [0-9]* has shut down, reason code \([0-9]*\).*/\1/p' /tmp/xl.log | tail -n 1)
    follow_suspended $end
    exec 4>&-
    if grep -q '^Waiting for domain' /tmp/xl.log; then
        # xenconsoled reads nothing for up to 200 ms from a guest that notified it 30 times in as long, and on a busy host it may not run
        # for longer. What it has not read when the domain is destroyed is lost: wait for the verdict, or as long as one may take.
        tries=0
        until [ -e /tmp/verdict ] || [ $tries -ge 30 ]; do
            usleep 100000
            tries=$((tries + 1))
        done
        if [ -n "$found" ]; then
            reason=$found
            status=0
        else
            status=137
        fi
        xl destroy firstlight
        # xenconsoled closes its file when the domain is destroyed, which ends the copying.
        wait $console
    else
        [ $status = 143 ] || status=1
        xl destroy firstlight 2>/dev/null
        kill $console
    fi
    [ -z "$actor" ] || kill "$actor" 2>/dev/null
    actor=
}

# remove_twins: the bridges of network cards with emulated twins, and the modules.
remove_twins() {
    for bridge in /sys/class/net/twins*; do
        [ -e "$bridge" ] && ip link del "${bridge##*/}"
    done
    for module in bridge stp llc tun; do rmmod $module; done
}
# beside COMMAND: starts a command of the shell beside the guest; settle() has its output and its exit status.
besides=0
beside() {
    besides=$((besides + 1))
    (
        eval "$1" > /tmp/beside-$besides 2>&1 3>&-
        echo $? > /tmp/beside-$besides.status
    ) &
    echo "$1" > /tmp/beside-$besides.command
}
udp_peer() { chmod +x "$job/files/udp-peer" && "$job/files/udp-peer" "$@"; }
# reachable ADDRESS: waits until it answers a ping, at most a minute.
reachable() {
    tries=0
    until ping -c 1 -W 1 "$1" > /dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 60 ] || { echo "$1 does not answer"; return 1; }
        usleep 200000
    done
}
# settle: what the commands beside the guest have printed, once they have ended.
settle() {
    number=0
    tries=0
    while [ $number -lt $besides ]; do
        number=$((number + 1))
        until [ -e /tmp/beside-$number.status ] || [ $tries -ge 100 ]; do
            tries=$((tries + 1))
            usleep 100000
        done
        while read -r text; do say "told $text"; done < /tmp/beside-$number
        result=$(cat /tmp/beside-$number.status 2>/dev/null || echo none)
        [ "$result" = 0 ] || say "failed $(cat /tmp/beside-$number.command): exit status $result, 0 was expected: $(tail -n 3 /tmp/beside-$number | tr '\n' ' ')"
    done
    besides=0
}

say "ready ms=$(milliseconds) kernel=$(uname -r)"
for job in /jobs/[0-9]*; do
    name=$(cat "$job/name")
    prepare() { :; }
    run() { status=1; }
    after() { :; }
    . "$job/job.sh"
    prepare
    echo "job $name"
    say "begin $name"
    from=$(milliseconds)
    run
    say "end $name status=$status reason=$reason ms=$(($(milliseconds) - from))"
    if [ "$status" != 0 ] && [ "$status" != 137 ]; then
        for log in /tmp/xl.log /var/log/xen/qemu-dm-*; do
            [ -e "$log" ] && grep -v '^Parsing config' "$log" | while read -r text; do say "note $name: $text"; done
        done
    fi
    after
    hurry
    /sbin/losetup --detach-all
    rm -rf /tmp/*
done
sync
say "off"
poweroff -f
