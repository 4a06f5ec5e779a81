#!/bin/busybox sh
# The first and only process of the lab's Linux: runs the jobs under /jobs one after the other and powers off.
# Its own lines begin with "@@lab TAG"; everything between "begin" and "end" is a job's own output.
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib HOME=/

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t debugfs debugfs /sys/kernel/debug
mount -t tmpfs -o size=75% tmpfs /tmp
stty -F /dev/console -opost -echo 2>/dev/null
echo 0 > /proc/sys/kernel/printk
ip link set lo up # QEMU's user-mode network sends to it what a guest sends to its host

exec 3>&1
. /jobs/common.sh
die() { say "broken $*"; sync; poweroff -f; }
milliseconds() { read -r up rest < /proc/uptime; echo "${up%.*}${up#*.}0"; }

while read -r module; do
    insmod "/modules/$module" 2>/dev/null || say "note: module $module was not loaded"
done < /jobs/modules
[ -c /dev/kvm ] || die "no /dev/kvm: the processor this machine emulates lacks SVM"

# bring_out IMAGE MEGABYTE: copy to the scratch disk, at that offset.
bring_out() {
    dd if="/tmp/$1" of=/dev/vda bs=1M seek="$2" conv=notrunc,fsync 2>/dev/null || die "image $1: could not be copied out"
}

# stop_at_times: reads lines of two numbers of microseconds, and after the first, stops the machine for the second.
# A machine that has ended cannot be stopped: then nothing is printed, and the test that requested it fails.
stop_at_times() {
    while read -r delay length; do
        usleep "$delay"
        machine=$(cat /tmp/paused-process)
        kill -STOP "$machine" 2>/dev/null
        # Earlier output is passed on first: everything before this mark was printed before the pause.
        usleep 50000
        grep -q '^State:.T' "/proc/$machine/status" 2>/dev/null && say "paused"
        usleep $((length - 50000))
        kill -CONT "$machine" 2>/dev/null
    done
}

# pausing COMMAND WORDS: runs the command; a line of its output that matches the next expression of $job/events starts that pause.
# The command's process id is that of the machine: busybox's timeout executes it in the same process.
pausing() {
    mkfifo /tmp/events
    stop_at_times < /tmp/events &
    stopper=$!
    {
        sh -c 'echo $$ > /tmp/paused-process; exec "$@"' sh "$@" 2>&1
        echo $? > /tmp/paused-status
    } | pass_on "$job/events"
    kill "$stopper" 2>/dev/null
    return "$(cat /tmp/paused-status)"
}

say "ready ms=$(milliseconds) kernel=$(uname -r)"
for job in /jobs/[0-9]*; do
    name=$(cat "$job/name")
    prepare() { :; }
    command() { false; }
    after() { :; }
    . "$job/job.sh"
    prepare
    say "begin $name"
    from=$(milliseconds)
    ( command ) < /dev/null 2>&1
    status=$?
    say "end $name status=$status ms=$(($(milliseconds) - from))"
    after
    rm -rf /tmp/*
done
sync
say "off"
poweroff -f
