#!/usr/bin/env bash
# Makes sure that this machine has a Python of 3.12 or later, and prints its path.
#   bash .ci/python.sh [--build]
# Where none is installed, or with --build, Debian's source package of 3.13 is built (about five minutes on two cores)
# and kept in ~/.cache/softmask_jax/python-<version>. Needs root on Debian or Ubuntu, a compiler comes along.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh

if [ "${1:-}" != --build ] && newest_python; then exit; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "No Python 3.12 or later, and building one needs root on Debian: install one and set PYTHON to its path." >&2
  exit 1
fi

cache="${XDG_CACHE_HOME:-$HOME/.cache}/softmask_jax"
mkdir -p "$cache"
work="$(mktemp -d "$cache/building-XXXXXX")" log="$cache/build.log"
exec 3>&1 4>&2 > "$log" 2>&1
finish() {
  local status=$?
  rm -rf "$work"
  if [ "$status" != 0 ]; then tail -n 20 "$log" >&4; fi
}
trap finish EXIT

apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc make xz-utils \
  libssl-dev zlib1g-dev libffi-dev libsqlite3-dev libbz2-dev liblzma-dev
# shellcheck disable=SC2016 # apt-get expands it
mirror="$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb-src [signed-by=$keys] ${mirror:?no Debian mirror among the sources of apt} trixie main" > "$work/sources.list"
mkdir "$work/lists" "$work/python"
own=(-o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$work/lists"
  -o APT::Sandbox::User=root)
apt-get "${own[@]}" update -qq
(cd "$work" && apt-get "${own[@]}" source --download-only -qq python3.13)
archive="$(echo "$work"/python3.13_*.orig.tar.xz)"
version="${archive##*python3.13_}" version="${version%.orig.tar.xz}"
tar -xJf "$archive" -C "$work/python" --strip-components=1
cd "$work/python"
./configure --quiet --prefix="$cache/python-$version"
make -s -j "$(nproc)"
make -s install "DESTDIR=$work/installed"
rm -rf "$cache/python-$version"
mv "$work/installed$cache/python-$version" "$cache/"
echo "$cache/python-$version/bin/python3" >&3
