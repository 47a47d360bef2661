# submit.sh SCENARIO OVERRIDES OUTPUT: a placeholder for `fedgan deploy run`: submits a scenario to the SuperLink, waits for the
# end, and writes the page. Ends with 0 only for a run that was completed.
set -eu
mkdir -p "$FLWR_HOME"
printf '[superlink.federation]\naddress = "superlink:8000"\nroot-certificates = "/keys/ca.crt"\n' > "$FLWR_HOME/config.toml"

value() { python -c "import json, sys; print(json.load(sys.stdin)$1)"; }

for _ in $(seq 24); do
    started=$(flwr run /app federation --format json \
        -c "scenario=\"$1\" overrides=\"$2\" output=\"$3\" deployed=true" 2>&1 | sed -n '/^{/,$p') || true
    run=$(printf '%s' "$started" | value '["run-id"]' 2> /dev/null) && break
    echo "no SuperLink yet: $(printf '%s' "$started" | tail -n 1)"
    sleep 5
done
echo "run ${run:?the SuperLink took no run}"

status=
while :; do
    now=$(flwr ls federation --run-id "$run" --format json 2> /dev/null | sed -n '/^{/,$p' | value '["runs"][0]["status"]') || now=unknown
    [ "$now" = "$status" ] || echo "$now"
    status=$now
    case $status in finished:*) break ;; esac
    sleep 15
done
[ "$status" = finished:completed ]
fedgan report "$3"
