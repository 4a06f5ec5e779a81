# Sourced by the scripts beside it: finds Python, installs it if it may, and becomes the command named by the caller.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
if [ ! -x /usr/bin/python3 ] || ! /usr/bin/python3 -c 'import argparse, json' 2>/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        echo "installing: python3 (the scripts are written in it)" >&2
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3; } >/dev/null </dev/null || {
            echo "$0: python3 could not be installed; see apt's message above" >&2
            exit 7
        }
    else
        echo "$0: missing package python3. Run: sudo apt-get install --no-install-recommends python3" >&2
        exit 7
    fi
fi
PYTHONDONTWRITEBYTECODE=1 exec /usr/bin/python3 "$here/firstlight" "$(basename -- "$0")" "$@"
