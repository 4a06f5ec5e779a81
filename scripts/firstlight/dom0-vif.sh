#!/bin/busybox sh
# Called by libxl for a network interface served by netback, in place of Xen's own script: interface N of the guest leads to dom0, which has the
# address 10.0.N.1 and gives 10.0.N.2 by DHCP.
export PATH=/xen/bin:/bin LD_LIBRARY_PATH=/lib
server=/run/udhcpd-$vif
if [ "$1" = offline ]; then
    [ -e "$server.pid" ] && kill "$(cat "$server.pid")"
    exit 0
fi
[ "$1" = online ] || exit 0
network=10.0.${vif##*.}
# A lease of two minutes, the server's clock being no matter here; option 6, a name server, is dom0 as well. No lease is written to a file before its end.
cat > "$server.conf" <<END
interface $vif
start $network.2
end $network.2
max_leases 1
lease_file $server.leases
pidfile $server.pid
option subnet 255.255.255.0
option router $network.1
option dns $network.1
option lease 120
END
touch "$server.leases"
if ip link set "$vif" up && ip addr add "$network.1/24" dev "$vif" && udhcpd -a 200 "$server.conf"; then
    xenstore-write "$XENBUS_PATH/hotplug-status" connected
else
    xenstore-write "$XENBUS_PATH/hotplug-error" "$vif could not be set up" "$XENBUS_PATH/hotplug-status" error
    exit 1
fi
