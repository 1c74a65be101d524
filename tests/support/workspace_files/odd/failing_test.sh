#!/bin/sh
echo "this line explains the failure"
exit 1
