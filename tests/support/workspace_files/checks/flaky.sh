#!/bin/sh
echo "marked flaky, passes at once"
