# PID 1 of the lab host once its root is the machine's own file system: runs the job and reports how it ended.
# Ports: 1 output, 2 errors, 3 input, 4 control, 5 the kernel's log. Each stream ends with $LAB_TOKEN, because closing a
# port does not tell the other side that everything was read. A port has one opener at a time.
b=/run/lab/busybox
. /run/lab/parameters
exec </dev/null
$b ip link set lo up
$b hostname lab
$b mkdir /sys/fs/cgroup/job

stream() { # PIPE PORT: copy a pipe to a port, then mark the end
    $b mkfifo "/run/lab/$1"
    { $b cat "/run/lab/$1"; printf '\001%s' "$LAB_TOKEN"; } >"/dev/vport0p$2" &
    streams="$streams $!"
}

stream out.pipe 1
stream err.pipe 2
port=10
for target in $LAB_FORWARD; do # sockets that are forwarded: ports 10 and up
    "$LAB_PYTHON" -S "$LAB_RELAY" "/dev/vport0p$port" "$target" &
    relays="$relays $!"
    port=$((port + 1))
done
exec 4>/dev/vport0p4
echo up >&4
# A host whose emulation hangs is silent, and so is a command at work: this tells one from the other.
while $b sleep 10; do echo alive; done >&4 & # to the very end
# In the foreground: a shell's background children ignore SIGINT, and so would the job.
(
    exec 4>&-
    echo 0 >/sys/fs/cgroup/job/cgroup.procs
    if [ -n "$LAB_TTY" ]; then
        : >/run/lab/out.pipe
        : >/run/lab/err.pipe
        exec </dev/hvc0 >/dev/hvc0 2>&1
        $b stty rows "${LAB_TTY% *}" cols "${LAB_TTY#* }"
        exec $b setsid -c $b sh /run/lab/job
    fi
    [ -z "$LAB_STDIN" ] || exec </dev/vport0p3
    exec $b setsid $b sh /run/lab/job >/run/lab/out.pipe 2>/run/lab/err.pipe
)
status=$?
# What the job left running ends with it, like the processes of a container; else an open pipe would hold the lab.
echo 1 >/sys/fs/cgroup/job/cgroup.kill
[ -z "$relays" ] || kill $relays
wait $streams
{ $b dmesg; printf '\001%s' "$LAB_TOKEN"; } >/dev/vport0p5
$b sync
[ -z "$LAB_SHARE" ] || $b umount "$LAB_SHARE"
echo "exit $status" >&4
while :; do $b sleep 1000; done
