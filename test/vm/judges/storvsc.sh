# A check of the test host's VMBus by Linux's own drivers. Runs in Linux's initramfs; every step has a bound, and the last line is the verdict.
verdict() {
    echo "@{\"record\":\"verdict\",\"verdict\":\"$1\",\"reason\":\"$2\"}"
    poweroff -f
}
# appears DEVICE yes|no: waits up to 20 s.
appears() {
    tries=0
    while [ $tries -lt 200 ]; do
        if [ "$2" = yes ]; then [ -b "/dev/$1" ] && return 0; else [ -b "/dev/$1" ] || return 0; fi
        tries=$((tries + 1))
        usleep 100000
    done
    return 1
}
# check DEVICE NAME MODE BLOCK DEPTH BYTES: writes with checksums, reads all of it back.
check() {
    fio --name="$2" --filename="/dev/$1" --rw="$3" --bs="$4" --iodepth="$5" --size="$6" --ioengine=libaio --direct=1 --thread \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --randrepeat=1 --fsync=64 --output=/tmp/out >/tmp/messages 2>&1 || {
        cat /tmp/out /tmp/messages
        verdict FAILURE "fio $2 on $1"
    }
    echo "judge: fio $2 on $1 verified"
}
uname -r
dmesg | grep -iE 'vmbus|hv_|Hyper-V: ' | head -20
dmesg | grep -qi 'Hypervisor detected: Microsoft Hyper-V' || verdict FAILURE "Linux sees no Hyper-V"
dmesg | grep -q 'hv_vmbus: Vmbus version:' || verdict FAILURE "no VMBus version was agreed on"
appears sda yes || verdict FAILURE "no sda"
echo "judge: sda $(cat /sys/block/sda/size) sectors, $(cat /sys/block/sda/device/vendor) $(cat /sys/block/sda/device/model)"
[ -b /dev/sdb ] && verdict FAILURE "sdb is there before it was added"
check sda small randwrite 4k 32 4m
check sda large write 256k 4 8m
check sda single randwrite 512 1 256k
echo "judge: hot add"
appears sdb yes || verdict FAILURE "sdb was added and did not appear"
check sdb added randwrite 4k 16 2m
echo "judge: hot remove"
appears sdb no || verdict FAILURE "sdb was removed and is still there"
check sda after randwrite 4k 32 2m
dmesg | grep -iE 'storvsc.*(error|fail|invalid)|hv_vmbus.*(error|fail|invalid)|I/O error.*sda' && verdict FAILURE "Linux complains"
verdict SUCCESS "verified on sda and sdb, added and removed"
