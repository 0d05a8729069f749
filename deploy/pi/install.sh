#!/bin/sh
# Makes a Raspberry Pi a device of a federation, from a fresh 64-bit Raspberry Pi OS (Debian 12 or newer) on: packages,
# user, virtual environment, joining, service. It may be run again at any time: what there is stays.
set -eu

usage() {
    cat <<'USAGE'
Usage: sudo sh install.sh --invitation FILE --task TASK [OPTIONS] [-- JOIN OPTIONS]

  --invitation FILE  Invitation of this device, from `ternbus aggregator invite`.
  --task TASK        Task, as of `ternbus edge join`; a module of your own by its absolute path.
  --data FOLDER      Folder with the task's data, readable for the user ternbus, not in /home, /root or /tmp.
  --torch            Install torch, for tasks that need it (about 1 GB on disk).
  --source SOURCE    What pip installs: a folder with the sources, a wheel, or a name.
                     [default: the folder above this script]
  --no-service       Do not install and start the systemd unit.
  --dry-run          Print the commands, and run none.
  -h, --help         Show this message and exit.

Options after -- go to `ternbus edge join`, for example: -- --partition iid:0/8 --max-epsilon 3 --dp device

The device is in /var/lib/ternbus/edge, the program in /opt/ternbus. To see it: journalctl -u ternbus-edge
USAGE
}

fail() {
    echo "install.sh: $1" >&2
    exit "${2:-2}"
}

here=$(cd "$(dirname "$0")" && pwd)
deploy=$(dirname "$here")
python=/usr/bin/python3 # the system's: the service cannot read one below /home or /root
prefix=/opt/ternbus home=/var/lib/ternbus/edge units=/etc/systemd/system
invitation='' task='' data='' torch=no source=$(dirname "$deploy") service=yes dry_run=no
while [ $# -gt 0 ]; do
    case $1 in
    --invitation | --task | --data | --source)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case $1 in
        --invitation) invitation=$2 ;;
        --task) task=$2 ;;
        --data) data=$2 ;;
        --source) source=$2 ;;
        esac
        shift 2
        ;;
    --torch) torch=yes && shift ;;
    --no-service) service=no && shift ;;
    --dry-run) dry_run=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown option $1: see --help" ;;
    esac
done

# A command, printed and run; --dry-run prints it only.
run() {
    echo "+ $*"
    [ "$dry_run" = yes ] || "$@"
}

[ -n "$invitation" ] || fail "no invitation is given: add --invitation FILE"
[ -n "$task" ] || fail "no task is given: add --task TASK"
[ -r "$invitation" ] || fail "$invitation cannot be read: give the file from ternbus aggregator invite"
[ -z "$data" ] || [ -d "$data" ] || fail "$data is not a folder: correct --data"
[ -z "$data" ] || data=$(cd "$data" && pwd -P)
for needed in "$data/" "$task"; do
    case $needed in
    /home/* | /root/* | /tmp/* | /var/tmp/*)
        [ "$service" = no ] || [ -d "$units/ternbus-edge.service.d" ] || fail "the service cannot read ${needed%/}: \
move it, for example to /srv, or relax the unit first, as deploy/README.md says"
        ;;
    esac
done
if [ "$dry_run" = no ]; then
    [ "$(id -u)" = 0 ] || fail "it installs packages and a service: run it with sudo"
    [ "$(getconf LONG_BIT)" = 64 ] || fail "this system has 32 bits, and torch and nats-server have no packages for it: \
install the 64-bit Raspberry Pi OS, or follow docs/operating.md by hand"
    command -v apt-get >/dev/null || fail "apt-get is missing: this script is for Raspberry Pi OS, Debian and Ubuntu"
fi

# Python with its venv module; a compiler is not needed, all packages have wheels.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    run apt-get update
    run env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && [ "$dry_run" = no ]; then
    fail "Python 3.11 or newer is needed, and this is $("$python" --version): upgrade to Raspberry Pi OS 12 (bookworm)"
fi

id ternbus >/dev/null 2>&1 || run useradd --system --home-dir /var/lib/ternbus --shell /usr/sbin/nologin ternbus

[ -x "$prefix/bin/python" ] || run "$python" -m venv "$prefix"
constraints=$(dirname "$deploy")/constraints.txt
pip() {
    if [ -e "$constraints" ]; then set -- -c "$constraints" "$@"; fi
    run "$prefix/bin/pip" install --disable-pip-version-check --upgrade "$@"
}
if [ "$torch" = yes ]; then
    pip --extra-index-url https://download.pytorch.org/whl/cpu "${source}[torch]"
else
    pip "$source"
fi

# The invitation is secret: the service's user reads a copy that goes away with this script.
run install -d -o ternbus -g ternbus -m 0755 /var/lib/ternbus
run install -d -o ternbus -g ternbus -m 0700 "$home"
if [ -e "$home/edge.toml" ] && ! grep -q '^code = ".' "$home/edge.toml"; then
    echo "$home has joined already: invitation, task, data and options of joining stay as they were"
else
    copy=$(mktemp)
    trap 'rm -f "$copy"' EXIT
    run install -o ternbus -g ternbus -m 0600 "$invitation" "$copy"
    [ -z "$data" ] || set -- --data "$data" "$@"
    run runuser -u ternbus -- "$prefix/bin/ternbus" edge join "$copy" "$home" --task "$task" "$@"
fi

if [ "$service" = yes ]; then
    run install -m 0644 "$deploy/systemd/ternbus-edge.service" "$units/ternbus-edge.service"
    run systemctl daemon-reload
    run systemctl enable ternbus-edge.service
    run systemctl restart ternbus-edge.service # also after an upgrade
fi
