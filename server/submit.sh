# submit.sh SCENARIO OVERRIDES OUTPUT: `fedgan deploy run` with overrides in one word ("training.kimg=10 seed=1"), each as a --set.
scenario=$1 overrides=$2 output=$3
set -f
set --
for pair in $overrides; do
    set -- "$@" --set "$pair"
done
exec fedgan deploy run "$scenario" --output "$output" --wait 120 "$@"
