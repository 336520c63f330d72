#!/bin/sh
# The first process of a host that is a set of namespaces: host.sh NAME FOLDER. FOLDER is its disk shared with others.
set -e
name=$1 shared=$2
hostname "$name"
mount --bind "$shared/hosts" /etc/hosts
mount --bind "$shared" /mnt
for folder in /tmp /run /dev/shm; do
    mount -t tmpfs -o mode=1777 tmpfs "$folder"
done
mkdir -p "$shared" /run/sshd
mount --bind /mnt "$shared"
umount /mnt
exec /usr/sbin/sshd -D -f "$shared/sshd_config" -E "$shared/$name.sshd.log"
