#!/bin/sh
set -eu
touch "$TEST_SHARD_STATUS_FILE"
echo "shard $TEST_SHARD_INDEX of $TEST_TOTAL_SHARDS"
[ "$TEST_TOTAL_SHARDS" -eq 3 ]
