#!/usr/bin/python3
"""What a synchronous call costs when one follows another: on each side one send, one wait and one
receive, and no other system call. strace counts those of two runs, one 1000 calls longer than the
other; the difference is what 1000 calls cost.

Needs strace and what `make examples` generates. The last line is "N passed, N failed".

crpc-test-timeout: 180
"""
import fnmatch
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile

import _build

CALLS = 1000
TRIES = 3
DEPTH1 = os.path.join(_build.BUILD, "syscalls", "depth1")
KINDS = {
    "send": ("sendmsg", "sendto", "write", "writev"),
    "wait": ("epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll"),
    "receive": ("recvmsg", "recvfrom", "read", "readv"),
}


def traced(log, *arguments):
    return subprocess.Popen(["strace", "-f", "-c", "-o", log, DEPTH1, *arguments],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


def end_tracee(tracer, signo):
    """Signals what strace runs; strace ends with it."""
    with open("/proc/%d/task/%d/children" % (tracer.pid, tracer.pid)) as children:
        for pid in children.read().split():
            os.kill(int(pid), signo)


def read_counts(log):
    counts = {}
    with open(log) as table:
        for line in table:
            words = line.split()
            if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
                counts[words[-1]] = counts.get(words[-1], 0) + int(words[3])
    return counts


def run(directory, kind, poller, url, calls):
    """({system call: times} of the server, the same of the client)."""
    logs = [os.path.join(directory, side) for side in ("server", "client")]
    server = traced(logs[0], "server", poller, url)
    client = None
    try:
        ready, _, _ = select.select([server.stdout], [], [], 10)
        line = server.stdout.readline().decode() if ready else ""
        if not line.startswith("listening on "):
            raise AssertionError("the server said %r" % line)
        client = traced(logs[1], kind, poller, line.split()[2], str(calls))
        output = client.communicate(timeout=60)[0].decode()
        if output != "%d ok, 0 failed, 0 late replies, poller %s\n" % (calls, poller):
            raise AssertionError("the client said %r" % output)
        end_tracee(server, signal.SIGTERM)
        if server.wait(10):
            raise AssertionError("the server ended with %d" % server.returncode)
    finally:
        for process in (server, client):
            if process and process.poll() is None:
                end_tracee(process, signal.SIGKILL)
                process.wait(10)
            if process:
                process.stdout.close()
    return [read_counts(log) for log in logs]


def difference(kind, poller, scheme):
    """What CALLS more calls cost: of the server, of the client."""
    with tempfile.TemporaryDirectory() as directory:
        url = "tcp://127.0.0.1:0" if scheme == "tcp" else "unix://%s/socket" % directory
        short, long = (run(directory, kind, poller, url, n * CALLS) for n in (1, 2))
    return [{name: more.get(name, 0) - less.get(name, 0) for name in sorted({*more, *less})
             if more.get(name, 0) != less.get(name, 0)} for less, more in zip(short, long)]


def faults(side, counts):
    """What is wrong with the cost of CALLS calls. A wait more now and then is none: a caller that
    was kept off the processor for 10 ms looks at its connection first."""
    out = []
    for kind, names in KINDS.items():
        n = sum(counts.get(name, 0) for name in names)
        allowed = CALLS // 50 if kind == "wait" else 0
        if not CALLS <= n <= CALLS + allowed:
            out.append("%s: %d of kind %s in %d calls" % (side, n, kind, CALLS))
    known = [name for names in KINDS.values() for name in names]
    # a descriptor that this side waits with must not be written: that would be a send too many
    out += ["%s: %d %s in %d calls" % (side, n, name, CALLS)
            for name, n in counts.items() if name not in known]
    return out


def show(counts):
    return ", ".join("%s %.3g" % (name, n / CALLS) for name, n in counts.items()) or "nothing"


def check(poller, scheme):
    for _ in range(TRIES):
        server, client = difference("client", poller, scheme)
        wrong = faults("server", server) + faults("client", client)
        if not wrong:
            break
    print("a call, %s, %s: server: %s; client: %s" % (poller, scheme, show(server), show(client)))
    for fault in wrong:
        print("  " + fault)
    return not wrong


def main():
    wildcard = os.environ.get("CRPC_TEST_FILTER") or "*"
    passed = failed = 0
    if not shutil.which("strace") or subprocess.run(
            ["strace", "-c", "-o", os.devnull, "true"], stderr=subprocess.DEVNULL,
            check=False).returncode:
        print("skipped: strace is not here, or not allowed to trace")
        print("0 passed, 0 failed")
        return 0
    _build.programs(os.path.dirname(DEPTH1), ["-O2"], "crpc_impl_tests/system/depth1.c")
    for poller in ("epoll", "poll"):
        for scheme in ("tcp", "unix"):
            if not fnmatch.fnmatch("syscalls.%s.%s" % (poller, scheme), wildcard):
                continue
            if check(poller, scheme):
                passed += 1
            else:
                failed += 1
        if wildcard == "*":     # for information: the loop's own thread makes the calls
            server, client = difference("callbacks", poller, "tcp")
            print("a callback, %s: server: %s; client: %s" % (poller, show(server), show(client)))
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
