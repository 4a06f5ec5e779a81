# Common to the inits of both labs' Linux systems; each has its own `die`.

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

# pass_on PAUSES: copies standard input line by line. A line that matches the next expression of the file PAUSES writes that pause's two numbers
# into the FIFO /tmp/pauses; without such a file lines are only copied. The record of the verdict, which is a run's last, makes the file /tmp/verdict.
pass_on() {
    awk -v pauses="$1" '
        function next_pause() {
            have = (getline entry < pauses) > 0
            if (have) {
                split(entry, words, " ")
                pattern = substr(entry, length(words[1]) + length(words[2]) + 3)
            }
        }
        BEGIN { next_pause() }
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
                print words[1], words[2] > "/tmp/pauses"
                fflush("/tmp/pauses")
                next_pause()
            }
        }
    '
}
