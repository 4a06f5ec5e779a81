#!/bin/busybox sh
# Called by libxl for a network interface served by netback, in place of Xen's own script: interface N of the guest leads to dom0, which has the address 10.0.N.1.
export PATH=/xen/bin:/bin LD_LIBRARY_PATH=/lib
[ "$1" = online ] || exit 0
if ip link set "$vif" up && ip addr add "10.0.${vif##*.}.1/24" dev "$vif"; then
    xenstore-write "$XENBUS_PATH/hotplug-status" connected
else
    xenstore-write "$XENBUS_PATH/hotplug-error" "$vif could not be set up" "$XENBUS_PATH/hotplug-status" error
    exit 1
fi
