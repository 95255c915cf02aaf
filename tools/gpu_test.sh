#!/bin/sh
# sh tools/gpu_test.sh PYTHON [SHARDS] [pytest arguments]: every GPU test. First those that want the GPUs to
# themselves (marked "alone"), then SHARDS processes at once, each with its part of the others: most of the
# time goes into compiling, on the CPU. Logs in build/gpu-test/. Exit code 1 when any process failed.
set -u
[ $# -ge 1 ] || { echo "usage: sh tools/gpu_test.sh PYTHON [SHARDS] [pytest arguments]" >&2; exit 2; }
python=$1 shards=${2:-4}
shift; [ $# -eq 0 ] || shift
case $shards in '' | *[!0-9]* | 0) echo "SHARDS must be a number from 1; got $shards" >&2; exit 2 ;; esac
logs=build/gpu-test
rm -rf $logs && mkdir -p $logs || exit 1

run() {
  name=$1
  shift
  "$python" -m pytest -q -rfEs -p no:xdist -p no:cacheprovider "$@" >"$logs/$name.log" 2>&1
  echo $? >"$logs/$name.code"
}

run alone -m "gpu and alone" "$@"
part=1
while [ "$part" -le "$shards" ]; do
  run "$part-of-$shards" -m "gpu and not alone" --shard "$part/$shards" "$@" &
  part=$((part + 1))
done
wait

failed=0
for log in "$logs"/*.log; do
  code=$(cat "${log%.log}.code" 2>/dev/null || echo none)
  [ "$code" = 0 ] || failed=1
  echo "$log: $(tail -n 1 "$log")"
  grep -E "^(FAILED|ERROR|SKIPPED)" "$log"
done
exit $failed
