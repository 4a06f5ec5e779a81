# Sourced by the yardstick's Linux: finds the disk to measure by the drivers that sysfs shows.

# above PATH: adds the drivers of this device and of the devices above it to `drivers`.
above() {
    at=$(readlink -f "$1")
    while [ "${at#/sys/devices/}" != "$at" ]; do
        [ -e "$at/driver" ] && drivers="$drivers $(basename "$(readlink -f "$at/driver")")"
        at=${at%/*}
    done
}

# bound_to BLOCK: sets `drivers` to those of a block device that has a file in /dev; fails for others: partitions, loop devices, an NVMe disk's paths.
bound_to() {
    [ -e "$1/device" ] && [ -b "/dev/$(basename "$1")" ] || return 1
    drivers=
    above "$1/device"
    [ -n "$drivers" ] && return
    # With multipath an NVMe disk belongs to a subsystem, which has links to its controllers.
    for controller in "$1"/device/nvme*; do above "$controller"; done
}

# find_disk DRIVER TRIES: sets `device` to the one disk with that driver; Linux attaches disks asynchronously, so it is searched for
# up to TRIES times, a tenth of a second apart. Fails if there is none, or if there are several, which cannot be told apart.
find_disk() {
    tries=0
    device=
    while [ -z "$device" ]; do
        for block in /sys/class/block/*; do
            bound_to "$block" || continue
            case "$drivers " in *" $1 "*) device="$device $(basename "$block")" ;; esac
        done
        device=${device# }
        tries=$((tries + 1))
        [ -n "$device" ] && break
        [ $tries -lt "$2" ] || return 1
        usleep 100000
    done
    case $device in *" "*) return 1 ;; esac
}

# missing DRIVER DISK: an error record that names what was expected and what there is; the machine ends.
missing() {
    seen=
    for block in /sys/class/block/*; do
        bound_to "$block" || continue
        seen="$seen, $(basename "$block") by$drivers"
    done
    printf '@{"record":"error","message":"Linux: one disk of its driver %s was expected for %s, its disks are: %s"}\n' "$1" "$2" "${seen#, }"
    end
}
