#!/bin/sh
set -eu
[ "$(generated/say.sh)" = said ]
[ -n "$TEST_TMPDIR" ]
echo scratch > "$TEST_TMPDIR/scratch"
echo undeclared > "$TEST_UNDECLARED_OUTPUTS_DIR/extra.txt"
