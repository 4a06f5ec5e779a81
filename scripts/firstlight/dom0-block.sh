#!/bin/busybox sh
# Called by libxl for a disk served by blkback, in place of Xen's own script (which needs bash and much more): gives the back end the device's number.
export PATH=/xen/bin:/bin LD_LIBRARY_PATH=/lib
[ "$1" = add ] || exit 0
device=$(xenstore-read "$XENBUS_PATH/params")
case $device in
/*) ;;
*) device=/dev/$device ;;
esac
number=$(stat -L -c '%t:%T' "$device") || {
    xenstore-write "$XENBUS_PATH/hotplug-error" "there is no $device" "$XENBUS_PATH/hotplug-status" error
    exit 1
}
xenstore-write "$XENBUS_PATH/physical-device" "$number" "$XENBUS_PATH/physical-device-path" "$device" "$XENBUS_PATH/hotplug-status" connected
