#!/bin/sh
# Munge, a Slurm controller and two node daemons on a host of tests/hosts.py: slurm.sh FOLDER, where slurm.conf lies.
set -e
folder=$1
mkdir -p /run/munge "$folder/state" "$folder/spool-n1" "$folder/spool-n2"
dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 2>/dev/null
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
slurmctld -f "$folder/slurm.conf" -L "$folder/slurmctld.log"
for node in n1 n2; do
    slurmd -f "$folder/slurm.conf" -N "$node" -L "$folder/slurmd-$node.log"
done
