# with-shard.sh DIR COMMAND…: waits up to five minutes for a shard in DIR or its sub-folders, then
# runs COMMAND. So missing images show in the container's log at once, not in a failed round.
dir=$1
shift
for second in $(seq 300); do
    for card in "$dir"/card.json "$dir"/*/card.json; do
        [ -f "$card" ] && exec "$@"
    done
    [ "$second" -eq 1 ] && echo "waiting for a shard (card.json) in $dir"
    sleep 1
done
echo "no shard in $dir: mount a folder of fedgan data import, readable by user $(id -u)" >&2
exit 3
