# Common to the inits of both labs' Linux systems; each has its own `die` and has opened the line of its output as file 3.

tag=$(cat /jobs/tag)
# say TEXT: a line of the init itself. Guests' output may be written at the same time, so that it must be one write: busybox's echo does one, its printf
# one for each line feed.
say() {
    echo "
@@lab $tag $*" >&3
}

# disk NAME BYTES zero|sparse|pattern: an image in memory.
disk() {
    image=/tmp/$1
    case $3 in
    sparse) truncate -s "$2" "$image" ;;
    zero) dd if=/dev/zero of="$image" bs=1M count=$((($2 + 1048575) / 1048576)) 2>/dev/null && truncate -s "$2" "$image" ;;
    pattern)
        yes 'firstlight pattern block: what a disk nobody wrote holds here' | head -c 1048576 > /tmp/pattern
        megabytes=$((($2 + 1048575) / 1048576))
        set -- "$1" "$2"
        while [ $# -lt $((megabytes + 2)) ]; do set -- "$@" /tmp/pattern; done
        bytes=$2
        shift 2
        cat "$@" > "$image" && truncate -s "$bytes" "$image"
        rm -f /tmp/pattern
        ;;
    *) die "disk $1: unknown content $3" ;;
    esac
    [ -s "$image" ] || die "disk $image: could not be made"
}

# pass_on EVENTS: copies standard input line by line. Each line of the file EVENTS is a text, a tab and an expression; a line that matches the next
# expression writes the text into the FIFO /tmp/events. Without such a file lines are only copied. The record of the verdict, which is a run's last, makes the file /tmp/verdict.
pass_on() {
    awk -v events="$1" '
        function next_event() {
            have = (getline entry < events) > 0
            if (have) {
                tab = index(entry, "\t")
                words = substr(entry, 1, tab - 1)
                pattern = substr(entry, tab + 1)
            }
        }
        BEGIN { next_event() }
        {
            print
            fflush()
            line = $0
            sub(/\r$/, "", line)
            if (line ~ /^@\{"record":"verdict"/) {
                printf "" > "/tmp/verdict"
                close("/tmp/verdict")
            }
            if (have && line ~ pattern) {
                print words > "/tmp/events"
                fflush("/tmp/events")
                next_event()
            }
        }
    '
}
