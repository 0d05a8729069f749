#!/bin/sh
# Makes a broker's certificates, a federation and the invitations of its first members, where they are missing.
# It may run again at any time: what there is stays as it is.
#
# From the environment: DATA, the folder with `bus`, `aggregator`, `invitations` and `mosquitto`; HOST, the name or address
# of the broker as devices reach it; FEDERATION; TASK, whose model is the first version; EVALUATOR; DEVICES, names with
# spaces between them. PORT is the broker's, 8883 by default.
set -eu

bus=$DATA/bus aggregator=$DATA/aggregator invitations=$DATA/invitations

if [ ! -e "$bus/broker.toml" ]; then
    # The broker is a container of its own: it listens on all addresses of that.
    ternbus broker init "$bus" --engine mosquitto --listen 0.0.0.0 --port "${PORT:-8883}" --name "$HOST" --name localhost
elif ! grep -qiF "names = [\"$HOST\"" "$bus/broker.toml"; then
    echo "setup.sh: the broker was made for another host than '$HOST', which is ignored: deploy/compose/README.md" >&2
fi

if [ ! -e "$aggregator/aggregator.toml" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    ternbus edge init-model "$TASK" "$scratch/model.safetensors"
    ternbus aggregator init "$aggregator" --federation "$FEDERATION" --broker-dir "$bus" \
        --model "$scratch/model.safetensors"
fi

if [ ! -e "$invitations/$EVALUATOR.toml" ]; then
    ternbus aggregator invite "$aggregator" --evaluator "$EVALUATOR" --out "$invitations"
fi
for device in $DEVICES; do
    if [ ! -e "$invitations/$device.toml" ]; then
        ternbus aggregator invite "$aggregator" "$device" --out "$invitations"
    fi
done
