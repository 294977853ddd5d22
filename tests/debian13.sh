#!/bin/sh
# Unpack packages of Debian 13 into a folder: debian13.sh FOLDER PACKAGE…
# Whatever release this machine has, and whatever its apt knows: the lists are the folder's own.
set -eu
folder=$1
shift
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
  sed -n "s/ $codename main\$//p" | head -n 1)
[ -n "$mirror" ] || { echo "debian13.sh: apt knows no source of Debian $codename" >&2; exit 1; }
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" "$folder/debs"
chmod -R a+rX "$folder"
echo "deb $mirror trixie main" >"$folder/sources.list"
apt13() {
  apt-get -qq -o Dir::Etc::SourceList="$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null -o Dir::State::Lists="$folder/lists" \
    -o Dir::Cache="$folder/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}
apt13 update
cd "$folder/debs" && apt13 download "$@"
for one in *.deb; do dpkg-deb -x "$one" "$folder"; done
rm -r "$folder/lists" "$folder/cache" "$folder/debs"
