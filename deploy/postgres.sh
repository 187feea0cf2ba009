#!/usr/bin/env bash
# A PostgreSQL server of its own below one folder, for tests, benchmarks and the demo: no Docker, no port, nothing else on the machine is touched.
#
#   postgres.sh start DIR [SETTING=VALUE ...]   make it if need be and start it; prints its folder's address without a database's name
#   postgres.sh stop DIR                        end it well
#   postgres.sh kill DIR                        end it as a crash does
#   postgres.sh wipe DIR                        end it and remove the folder
#
# It listens on a Unix socket in DIR alone and lets in whoever may enter DIR. Started as root it runs as `postgres` or `nobody`:
# PostgreSQL refuses root. The folders above DIR must let that user pass.
set -euo pipefail

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
[[ $# -ge 2 ]] || usage
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
data=$folder/data

programs=$(find /usr/lib/postgresql /usr/pgsql-* /opt/homebrew/opt/postgresql* -name initdb -path '*/bin/*' 2>/dev/null | sort -V | tail -n 1 || true)
programs=${programs:-$(command -v initdb || true)}
if [[ -z $programs ]]; then
    echo "PostgreSQL is not installed: apt-get install postgresql (15 or newer)" >&2
    exit 3
fi
programs=$(dirname "$programs")

as_user() {
    if [[ $(id -u) != 0 ]]; then
        "$@"
    elif id postgres >/dev/null 2>&1; then
        runuser -u postgres -- "$@"
    else
        runuser -u nobody -- "$@"
    fi
}

start() {
    if [[ ! -f $data/PG_VERSION ]]; then
        if [[ $(id -u) == 0 ]]; then
            chown "$(as_user id -un)" "$folder"
        fi
        chmod 700 "$folder"
        as_user "$programs/initdb" --pgdata="$data" --username=ratchet --auth=trust --encoding=UTF8 --locale=C.UTF-8 --no-sync >"$folder/initdb.log"
    fi
    local options="-c listen_addresses= -c unix_socket_directories=$folder -c port=5432"
    for setting in "$@"; do
        options+=" -c $setting"
    done
    if ! as_user "$programs/pg_ctl" status --pgdata="$data" >/dev/null; then
        as_user "$programs/pg_ctl" start --silent --wait --timeout=60 --pgdata="$data" --log="$folder/server.log" --options="$options" >/dev/null ||
            { tail -n 5 "$folder/server.log" >&2; exit 1; }
    fi
    echo "postgresql://ratchet@/?host=$folder"
}

end() {
    if as_user "$programs/pg_ctl" status --pgdata="$data" >/dev/null 2>&1; then
        as_user "$programs/pg_ctl" stop --silent --wait --mode="$1" --pgdata="$data"
    fi
}

case $action in
start) start "${@:3}" ;;
stop) end fast ;;
kill) end immediate ;;
wipe)
    end immediate
    rm -rf "$folder"
    ;;
*) usage ;;
esac
