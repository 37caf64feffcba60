#!/bin/busybox sh
# PID 1 of the lab host, from the initramfs: loads the modules, builds the copy-on-write view of the machine's files and
# goes on in it with inside.sh. Parameters come from /lab/parameters (written by host.py).
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
$b mount -t sysfs sys /sys
. /lab/parameters

load() { # what is loaded in the background is waited for in inside.sh
    for module in "$@"; do
        options=
        [ "${module##*-}" != kvm_amd.ko ] || options="npt=$LAB_NPT nested=0"
        $b insmod "$module" $options || echo "lab: cannot load $module"
    done
}
load /modules/1-*
load /modules/2-* &

$b mkdir -p /lower /rw /root
$b mount -t virtiofs -o ro root /lower || { echo "lab: cannot mount the machine's files"; $b reboot -f; }
$b mount -t tmpfs -o size=75% rw /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work root /root || $b reboot -f

cd /root
$b mkdir -p proc sys dev run tmp
$b mount -t proc proc proc
$b mount -t sysfs sys sys
$b mount -t cgroup2 cgroup2 sys/fs/cgroup
$b mount --move /dev dev
$b mkdir -p dev/pts dev/shm
$b mount -t devpts -o ptmxmode=666 devpts dev/pts
$b mount -t tmpfs -o mode=1777 shm dev/shm
$b mount -t tmpfs -o mode=755 run run
$b mkdir -p run/lab run/lock
$b cp -a /bin/busybox /lab/. run/lab/
# What was written in the lab and nothing else: below, files that others make outside meanwhile show through.
$b mkdir run/lab/written
$b mount -o bind /rw/upper run/lab/written
# At the same path as outside, so that a command need not know where it runs.
[ -z "$LAB_SHARE" ] || $b mount -t virtiofs out "/root$LAB_SHARE" || $b reboot -f
if [ -d "/root$LAB_MODULES" ]; then
    $b mkdir -p "lib/modules/$($b uname -r)"
    $b mount -o bind "/root$LAB_MODULES" "lib/modules/$($b uname -r)"
fi
wait
exec $b switch_root /root /run/lab/busybox sh /run/lab/inside.sh
