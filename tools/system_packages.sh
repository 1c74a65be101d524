#!/bin/sh
# Make sure that this machine has the programs that Lathe needs and pip cannot install.
#
#   tools/system_packages.sh run     to run the services
#   tools/system_packages.sh test    to run the tests as well
#   tools/system_packages.sh compose to run the tests of the compose stack as well; the engine itself is not installed
#
# Looks for what the programs can do, not for packages: a python3 that is not Debian's needs no python3-venv. Installs
# with apt as root; anybody else gets the command to type. PYTHON names another interpreter than python3.
set -eu

purpose=${1:?"usage: $0 run|test|compose"}
python=${PYTHON:-python3}

if ! command -v "$python" > /dev/null; then
    echo "Lathe needs Python 3.11 or later; there is no $python here." >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Lathe needs Python 3.11 or later; $python is $("$python" -V). Name another one: PYTHON=python3.12 make $purpose" >&2
    exit 1
fi

missing=
need() { missing="$missing $1"; }

if ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
    if [ "$("$python" -c 'import sys; print(sys.base_prefix)')" != /usr ]; then
        echo "$python cannot make virtual environments: it lacks venv or ensurepip, and it is not the system's." >&2
        exit 1
    fi
    need python3-venv
fi
command -v bwrap > /dev/null || need bubblewrap
if [ "$purpose" != run ]; then
    command -v bazel > /dev/null || need bazel-bootstrap
    command -v g++ > /dev/null || need g++
    command -v setpriv > /dev/null || need util-linux
    command -v curl > /dev/null || need curl
    command -v ccache > /dev/null || need ccache
    command -v h2load > /dev/null || need nghttp2-client
    command -v openssl > /dev/null || need openssl
fi
if [ "$purpose" = compose ]; then
    # TLS for Debian's Bazel: tests/support/bazel_tls.py says why.
    ls /usr/lib/*/jni/libnetty-tcnative.so > /dev/null 2>&1 || need libnetty-tcnative-jni
fi
[ -n "$missing" ] || exit 0

# Word splitting of $missing is what is wanted from here on: one word is one package.
install="apt-get install --yes --no-install-recommends$missing"
if ! command -v apt-get > /dev/null; then
    echo "Lathe needs what Debian calls$missing; this machine has no apt-get, so please install that first." >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "Lathe needs$missing. Please install first:" >&2
    echo "    sudo $install" >&2
    exit 1
fi

echo "Installing$missing"
export DEBIAN_FRONTEND=noninteractive
# A machine's package lists may be absent, or so old that what they name is gone; only then are they fetched.
if ! { $install --quiet=2 > /dev/null 2>&1; }; then
    apt-get update --quiet=2
    $install --quiet=2 > /dev/null
fi
