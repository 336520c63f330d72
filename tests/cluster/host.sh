#!/bin/sh
# The first process of a host that is a set of namespaces: host.sh NAME FOLDER. FOLDER is its disk shared with others.
set -e
name=$1 shared=$2
checkout=$(cd "$(dirname "$0")/../.." && pwd)
hostname "$name"
mount --bind "$shared/hosts" /etc/hosts
mount -t tmpfs tmpfs /mnt
mkdir /mnt/shared /mnt/checkout
mount --bind "$shared" /mnt/shared
mount --bind "$checkout" /mnt/checkout
for folder in /tmp /run /dev/shm; do
    mount -t tmpfs -o mode=1777 tmpfs "$folder"
done
mkdir -p "$shared" "$checkout" /run/sshd # both may lie in what is covered now
mount --bind /mnt/checkout "$checkout"
mount --bind /mnt/shared "$shared"
umount -R /mnt
exec /usr/sbin/sshd -D -f "$shared/sshd_config" -E "$shared/$name.sshd.log"
