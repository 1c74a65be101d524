#!/bin/sh
echo "this line was printed before the timeout"
exec sleep 300
