#!/bin/sh
set -eu
"$1" | grep -q '^app_1 '
