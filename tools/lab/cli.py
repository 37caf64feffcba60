"""The command `lab`: what a person or a script types."""

from __future__ import annotations

import argparse
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from . import debian, guests, host, modules, probe, suite
from .process import orderly_end
from .progress import say

EXIT_LAB, EXIT_TIMEOUT = 125, 124  # as `docker run` and timeout(1) have them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one lab command; returns the exit status: the command's own, 124 for a timeout, 125 when the lab itself failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    options = _parser().parse_args(given)
    try:
        return int(options.do(options, command))
    except (host.LabError, debian.SetupError) as error:
        say(f"lab: {error}")
        return EXIT_LAB
    except TimeoutError as error:
        say(f"lab: {error}")
        return EXIT_TIMEOUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab", description="A host with a real /dev/kvm, on any machine, over this machine's files."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    boots = argparse.ArgumentParser(add_help=False)
    boots.add_argument("--arch", default="x86_64", help="architecture of the lab host (x86_64)")
    boots.add_argument("--smp", type=int, default=2, metavar="N", help="CPUs (2)")
    boots.add_argument("--memory", type=int, default=4096, metavar="MIB", help="memory in MiB (4096)")
    boots.add_argument("--timeout", type=float, metavar="S", help="end everything after S seconds, with status 124")
    boots.add_argument("--out", type=Path, metavar="DIR", help="a folder that the command writes to as $LAB_OUT")
    boots.add_argument("--dmesg", type=Path, metavar="FILE", help="where to put the lab host's kernel log afterwards")
    boots.add_argument(
        "--forward",
        action="append",
        default=[],
        metavar="PATH:LABPATH",
        help="a unix socket PATH here that leads to LABPATH in the lab, once that exists; repeatable",
    )
    boots.add_argument(
        "--boot-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="start the lab host once more if it is not up after S seconds (60), and wait four times as long",
    )
    boots.add_argument(
        "--stall",
        type=float,
        default=300.0,
        metavar="S",
        help="end everything when the lab host stands still for S seconds (300)",
    )
    boots.add_argument("--qemu", action="append", default=[], metavar="ARG", help="a further argument for QEMU; repeatable")
    boots.add_argument("--verbose", action="store_true", help="the lab host's console on standard error")

    run = commands.add_parser("run", parents=[boots], help="run a command in the lab: lab run [OPTIONS] -- COMMAND...")
    run.add_argument("--no-tty", action="store_true", help="do not give the command a terminal even when we have one")
    run.set_defaults(do=_run)
    auto = commands.add_parser(
        "auto", parents=[boots], help="run a command here if our own KVM runs guests directly, else in the lab"
    )
    auto.add_argument("--no-tty", action="store_true", help="do not give the command a terminal even when we have one")
    auto.set_defaults(do=_auto)
    tests = commands.add_parser(
        "tests", help="run pytest as `auto` does, and once more what failed in the lab: lab tests -- PYTEST..."
    )
    tests.add_argument(
        "--timeout", type=float, required=True, metavar="S", help="end everything after S seconds, with status 124"
    )
    tests.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder for results")
    tests.set_defaults(do=_tests)
    look = commands.add_parser("probe", help="say whether our own KVM runs guests directly; exit status 0 for yes, 1 for no")
    look.set_defaults(do=_probe)
    shell = commands.add_parser("shell", parents=[boots], help="a root shell in the lab")
    shell.set_defaults(do=_shell)
    setup = commands.add_parser("setup", help="install and download everything that the lab needs")
    setup.add_argument("--refresh", action="store_true", help="look for a newer kernel")
    setup.set_defaults(do=_setup)
    assets = commands.add_parser(
        "assets", help="build what guests boot from; prints kernel=, initrd= and rootfs= with their paths"
    )
    assets.add_argument(
        "--flavour", choices=["cloud", "generic"], default="cloud", help="which of the distribution's kernels (cloud)"
    )
    assets.add_argument("--size", type=int, default=256, metavar="MIB", help="size of the root image in MiB (256)")
    assets.add_argument(
        "--virtio-words",
        action="store_true",
        help="build the driver of virtio_mmio.device= words too, which stock kernels lack; prints virtio_mmio=",
    )
    assets.set_defaults(do=_assets)
    return parser


def _options(options: argparse.Namespace, tty: bool) -> host.Options:
    if options.smp < 1 or options.memory < 512:
        raise host.LabError("--smp must be at least 1, --memory at least 512")
    if not options.stall > host.HEARTBEAT:
        raise host.LabError(
            f"--stall {options.stall:g}: must be more than {host.HEARTBEAT:g} s: that often the lab host is heard of"
        )
    return host.Options(
        arch=options.arch,
        smp=options.smp,
        memory=options.memory,
        timeout=options.timeout,
        boot_timeout=options.boot_timeout,
        stall=options.stall,
        out=options.out,
        dmesg=options.dmesg,
        tty=tty,
        stdin=not tty and _has_input(),
        qemu=options.qemu,
        forward=_forwards(options.forward),
        verbose=options.verbose,
    )


def _forwards(given: Sequence[str]) -> dict[Path, str]:
    forwards = {}
    for item in given:
        path, separator, target = item.partition(":")
        if not path or not separator or not target or " " in target or "," in path:
            raise host.LabError(f"--forward {item}: must be PATH:LABPATH, without commas and blanks")
        forwards[Path(path).absolute()] = target
    return forwards


def _has_input() -> bool:
    """Whether standard input is something to pass on: a pipe, a file, a socket; not a terminal, /dev/null or nothing."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return not stat.S_ISCHR(mode)


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    if not command:
        raise host.LabError("no command: lab run [OPTIONS] -- COMMAND...")
    return host.run(command, _options(options, tty=not options.no_tty and os.isatty(0) and os.isatty(1)))


def _auto(options: argparse.Namespace, command: Sequence[str]) -> int:
    """In the lab, or directly; says which and why."""
    answer = probe.probe()
    if not answer.native:
        say(f"Running in the lab: {answer.reason}.")
        return _run(options, command)
    if not command:
        raise host.LabError("no command: lab auto [OPTIONS] -- COMMAND...")
    say(f"Running directly: {answer.reason}.")
    environment = dict(os.environ)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        environment["LAB_OUT"] = str(options.out.resolve())
    limit = [] if options.timeout is None else ["timeout", "--kill-after=10", f"{options.timeout:g}"]
    try:
        os.execvpe((*limit, *command)[0], [*limit, *command], environment)
    except OSError as error:
        raise host.LabError(f"{command[0]}: {error.strerror}") from None


def _tests(options: argparse.Namespace, command: Sequence[str]) -> int:
    if not command:
        raise host.LabError("no command: lab tests [OPTIONS] -- PYTEST...")
    return suite.run(command, options.out.resolve(), options.timeout)


def _probe(_options: argparse.Namespace, _: Sequence[str]) -> int:
    answer = probe.probe()
    print(f"{'yes' if answer.native else 'no'}: {answer.reason}")
    return 0 if answer.native else 1


def _shell(options: argparse.Namespace, command: Sequence[str]) -> int:
    if not os.isatty(0) or not os.isatty(1):
        raise host.LabError("shell: needs a terminal; use 'lab run -- COMMAND...'")
    return host.run(command or [os.environ.get("SHELL", "/bin/sh")], _options(options, tty=True))


def _setup(options: argparse.Namespace, _: Sequence[str]) -> int:
    with orderly_end():
        debian.install(debian.missing())
        if options.refresh:
            debian.refresh("cloud")
        kernel, _initrd = host.assets()
    say(f"The lab is ready: kernel {kernel.release}.")
    return 0


def _assets(options: argparse.Namespace, _: Sequence[str]) -> int:
    with orderly_end():
        kernel = guests.kernel(options.flavour)
        print(f"kernel={kernel.image}\ninitrd={guests.initrd(kernel)}\nrootfs={guests.rootfs(options.size)}")
        if options.virtio_words:
            print(f"virtio_mmio={modules.virtio_mmio_with_words(kernel)}")
    return 0
