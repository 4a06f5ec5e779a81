# Sourced by the scripts in this folder, with their own path in $self: finds Python, installs it if allowed, and executes the command of that name.
here=$(dirname -- "$self")
if [ ! -x /usr/bin/python3 ] || ! /usr/bin/python3 -c 'import argparse, json' 2>/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        echo "installing: python3 (the scripts are written in it)" >&2
        said=$({ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3; } 2>&1 </dev/null) || {
            printf '%s\n' "$said" | grep '^[EW]:' | head -n 3 >&2
            echo "$0: python3 could not be installed, see above; with a network, run the same command again" >&2
            exit 7
        }
    else
        echo "$0: missing package python3. Run: sudo apt-get install --no-install-recommends python3" >&2
        exit 7
    fi
fi
PYTHONDONTWRITEBYTECODE=1 exec /usr/bin/python3 "$here/firstlight" "$(basename -- "$self")" "$@"
