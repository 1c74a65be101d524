#!/bin/sh
echo "this workspace collects no coverage" >&2
exit 1
