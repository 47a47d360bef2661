# submit.sh SCENARIO OVERRIDES OUTPUT: `fedgan deploy run` with a --set for each override;
# OVERRIDES is one argument ("training.kimg=10 seed=1").
scenario=$1 overrides=$2 output=$3
set -f
set --
for pair in $overrides; do
    set -- "$@" --set "$pair"
done
exec fedgan deploy run "$scenario" --output "$output" --wait 120 "$@"
