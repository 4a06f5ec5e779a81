#!/bin/busybox sh
# Called by libxl for a network interface served by netback, in place of Xen's own script: interface N of the guest leads to dom0, which has the
# address 10.0.N.1 and gives 10.0.N.2 by DHCP. An interface with an emulated twin, which QEMU serves by a tap device, is on a bridge with that.
export PATH=/xen/bin:/bin LD_LIBRARY_PATH=/lib
port=$vif
[ "$2" = type_if=tap ] && port=$INTERFACE
number=${port##*.}
number=${number%-emu}
network=10.0.$number
leads_to=$port
[ -e /tmp/twins ] && leads_to=twins$number
server=/run/udhcpd-$number

# begin: dom0's end of the network. A lease of two minutes; option dns is a name server, dom0 as well.
begin() {
    cat > "$server.conf" <<END
interface $leads_to
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
    : > "$server.leases"
    if [ "$leads_to" != "$port" ]; then ip link add "$leads_to" type bridge || return; fi
    ip link set "$leads_to" up && ip addr add "$network.1/24" dev "$leads_to" && udhcpd -a 200 "$server.conf"
}
connect() {
    ip link set "$port" up || return
    [ "$leads_to" = "$port" ] || ip link set "$port" master "$leads_to"
}

case "$1 $2" in
"online "*)
    if { [ -e "/sys/class/net/twins$number" ] || begin; } && connect; then
        xenstore-write "$XENBUS_PATH/hotplug-status" connected
    else
        xenstore-write "$XENBUS_PATH/hotplug-error" "$vif could not be set up" "$XENBUS_PATH/hotplug-status" error
        exit 1
    fi
    ;;
"add type_if=tap") connect ;;
"offline "*) [ -e "$server.pid" ] && kill "$(cat "$server.pid")" ;;
esac
exit 0
