# with-shard.sh DIR COMMAND…: waits up to five minutes for a shard in DIR or in its sub-folders, then becomes COMMAND.
# Whoever runs the container sees here, and not in a failed round, that there are no images.
dir=$1
shift
for second in $(seq 300); do
    for card in "$dir"/card.json "$dir"/*/card.json; do
        [ -f "$card" ] && exec "$@"
    done
    [ "$second" -eq 1 ] && echo "waiting for a shard (card.json) in $dir"
    sleep 1
done
echo "no shard in $dir: mount the folder that fedgan data import wrote, readable by user $(id -u)" >&2
exit 3
