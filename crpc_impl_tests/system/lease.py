#!/usr/bin/python3
"""Never two holders of one lock: three contenders, an ensemble of three servers, each in a network
namespace of its own, and links that freeze, servers that die and servers that stop. Each contender
knows one server. Two must never hold by their leases at the same moment, and a holder that lost has
a successor in time.

    lease.py [N]      each kind of trouble N times (3; 50 take half an hour)

Needs root. The last line is "N passed, N failed".

crpc-test-timeout: 480
"""
import fnmatch
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from kazoo.client import KazooClient

import _build
import _zookeeper

CONTENDER = os.path.join(_build.BUILD, "lease", "contender")
TICK_MS, SESSION_MS = 500, 2000
LEASE_S = SESSION_MS * 3 / 8 / 1000
PATH = "/locks/one"
PORT = 2181


def run(*command):
    subprocess.run(command, check=True)


def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def await_true(seconds, condition, what):
    end = now() + seconds
    while not condition():
        if now() > end:
            raise AssertionError("not within %g s: %s" % (seconds, what))
        time.sleep(0.01)


# --- hosts ----------------------------------------------------------------------------------------

def make_network():
    run("mount", "-t", "tmpfs", "run", "/run")
    os.mkdir("/run/netns")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "hub0", "type", "bridge")
    run("ip", "link", "set", "hub0", "up")
    run("ip", "addr", "add", "10.77.0.254/24", "dev", "hub0")


class Host:
    """A network namespace with one address."""

    def __init__(self, number):
        self.name, self.address = "h%d" % number, "10.77.0.%d" % number
        port = "v%d" % number
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "e0", "netns", self.name)
        run("ip", "link", "set", port, "master", "hub0", "up")
        run("ip", "-n", self.name, "addr", "add", self.address + "/24", "dev", "e0")
        run("ip", "-n", self.name, "link", "set", "e0", "up")
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        self.prefix = ("ip", "netns", "exec", self.name)

    def cut(self, other):
        """The link between the two swallows everything, both ways; their other links do not."""
        for a, b in ((self, other), (other, self)):
            run("ip", "-n", a.name, "neigh", "replace", b.address, "lladdr", "02:00:00:00:00:99",
                "dev", "e0", "nud", "permanent")

    def mend(self, other):
        for a, b in ((self, other), (other, self)):
            run("ip", "-n", a.name, "neigh", "del", b.address, "dev", "e0")


class Server(_zookeeper.Server):
    tick_ms = TICK_MS

    def __init__(self, directory, number):
        self.machine = Host(number)
        self.host, self.prefix = self.machine.address, self.machine.prefix
        super().__init__(directory, PORT, "initLimit=10\nsyncLimit=8\n" + "".join(
            "server.%d=10.77.0.%d:2888:3888\n" % (i, i) for i in (1, 2, 3)), number)


class Contender:
    """A process; its intervals of holding are in self.held, the last one open while it holds."""

    def __init__(self, server, number, log, path=PATH):
        self.machine, self.server, self.log = Host(10 + number), server, log
        self.file = open(log, "wb")
        self.process = subprocess.Popen(
            [*self.machine.prefix, CONTENDER, "zookeeper://%s:%d" % (server.host, PORT), path,
             str(SESSION_MS)], stdin=subprocess.DEVNULL, stdout=self.file, stderr=self.file,
            preexec_fn=_zookeeper.die_with_parent)

    def text(self):
        with open(self.log, errors="replace") as f:
            return f.read()

    def held(self):
        begins, ends = ([int(us) / 1e6 for us in re.findall(pattern, self.text(), re.M)]
                        for pattern in (r"^begin (\d+)$", r"^end (\d+)$"))
        return list(zip(begins, ends + [float("inf")]))

    def session(self):
        return int((re.findall(r"session 0x([0-9a-f]+)", self.text()) or ["0"])[-1], 16)

    def holds(self):
        held = self.held()
        return bool(held) and held[-1][1] == float("inf")

    def end(self):
        self.process.terminate()
        status = self.process.wait(20)
        self.file.close()
        if status != 0 or "anitizer" in self.text() or "runtime error" in self.text():
            raise AssertionError("a contender ended with %d: %s" % (status, self.text()[-3000:]))


# --- the ensemble and its contenders --------------------------------------------------------------

class Fleet:
    def __init__(self, directory):
        self.servers = [Server(os.path.join(directory, str(i)), i) for i in (1, 2, 3)]
        for server in self.servers:
            server.launch()
        for server in self.servers:
            server.await_service()
        self.client = KazooClient(hosts=",".join("%s:%d" % (s.host, PORT) for s in self.servers),
                                  timeout=20)
        self.client.start(20)
        self.directory = directory
        self.contenders = [Contender(s, i, os.path.join(directory, "contender%d" % i))
                           for i, s in enumerate(self.servers)]
        self.settle()

    def leader(self):
        return next(s for s in self.servers if s.mode() == "leader")

    def holder(self):
        return next((c for c in self.contenders if c.holds()), None)

    def everybody_queues(self):
        """Each contender has a node of its present session, and one of them holds."""
        def owner(name):
            stat = self.client.retry(self.client.exists, PATH + "/" + name)
            return stat and stat.owner_session_id
        owners = [owner(name) for name in self.client.retry(self.client.get_children, PATH)]
        return self.holder() and sorted(map(str, owners)) == sorted(
            str(contender.session()) for contender in self.contenders)

    def settle(self):
        """Each server takes part in the quorum again: a new session is a write. And the contenders
        have found their places."""
        for server in self.servers:
            server.await_service()
            client = KazooClient(hosts="%s:%d" % (server.host, PORT), timeout=20)
            client.start(20)
            client.stop()
        await_true(30, self.everybody_queues, "everybody is in the queue")

    def overlap(self):
        """The longest time for which two held, in seconds, and when."""
        held = sorted((begin, end, i) for i, c in enumerate(self.contenders)
                      for begin, end in c.held())
        return max([(min(a[1], b[1], now()) - b[0], b[0]) for k, a in enumerate(held)
                    for b in held[k + 1:] if a[2] != b[2] and b[0] < a[1]], default=(0, 0))

    def successor(self, holder, since, within):
        """Waits for one after the holder's, which began its trouble at `since`."""
        await_true(within - (now() - since), lambda: any(
            c is not holder and c.held() and c.held()[-1][0] > since for c in self.contenders),
            "a successor")

    def end(self):
        for contender in self.contenders:
            contender.end()
        self.client.stop()
        for server in self.servers:
            server.crash()


# --- troubles -------------------------------------------------------------------------------------

IN_TIME_S = SESSION_MS / 1000 + 1.5 * TICK_MS / 1000 + LEASE_S + 1
NO_QUORUM_S = 8 * TICK_MS / 1000 + 2    # until the others notice a silent leader, and elect


def links_of(fleet, server):
    """Those between this follower and its leader, or between this leader and its followers."""
    leader = fleet.leader()
    others = [s for s in fleet.servers if s is not server] if server is leader else [leader]
    return [(server.machine, other.machine) for other in others]


def link_of_follower_and_leader(fleet, holder):
    links = links_of(fleet, holder.server)
    for a, b in links:
        a.cut(b)
    yield IN_TIME_S + NO_QUORUM_S * (len(links) > 1)
    time.sleep(NO_QUORUM_S)     # as long as a server may not notice, and serve its clients
    for a, b in links:
        a.mend(b)


def link_of_client_and_server(fleet, holder):
    holder.machine.cut(holder.server.machine)
    yield IN_TIME_S
    holder.machine.mend(holder.server.machine)


def leader_killed(fleet, holder):
    leader = fleet.leader()
    leader.crash()
    yield IN_TIME_S + NO_QUORUM_S if holder.server is leader else 0
    leader.launch()


def leader_stopped(fleet, holder):
    leader = fleet.leader()
    leader.freeze()
    yield IN_TIME_S + NO_QUORUM_S if holder.server is leader else 0
    time.sleep(NO_QUORUM_S)
    leader.thaw()


def holders_server_stopped(fleet, holder):
    leader = fleet.leader()
    holder.server.freeze()
    yield IN_TIME_S + NO_QUORUM_S * (holder.server is leader)
    holder.server.thaw()


def clock_of_holder_stepped(fleet, holder):
    holder.process.send_signal(signal.SIGUSR1)
    yield IN_TIME_S


TROUBLES = [link_of_follower_and_leader, link_of_client_and_server, leader_killed, leader_stopped,
            holders_server_stopped, clock_of_holder_stepped]


def turns_with_kazoo(fleet):
    """A contender of crpc, one of kazoo, one of crpc: each begins when the one before it ends."""
    path = "/locks/two"

    def contender(number):
        return Contender(fleet.servers[0], number,
                         os.path.join(fleet.directory, "contender%d" % number), path)

    def waiting(count):
        await_true(20, lambda: fleet.client.exists(path) and len(
            fleet.client.get_children(path)) == count, "%d in the queue" % count)
    first = contender(10)
    await_true(20, first.holds, "the first holds")
    lock = fleet.client.Lock(path, extra_lock_patterns=["-lock-"])
    thread = threading.Thread(target=lock.acquire, daemon=True)
    thread.start()
    waiting(2)
    last = contender(11)
    waiting(3)
    time.sleep(1)
    if lock.is_acquired or last.holds():
        raise AssertionError("two hold")
    first.end()
    await_true(20, lambda: lock.is_acquired, "kazoo holds")
    time.sleep(1)
    if last.holds():
        raise AssertionError("two hold")
    lock.release()
    await_true(20, last.holds, "the last holds")
    last.end()


ONCE = [turns_with_kazoo]


def test(fleet, trouble):
    if trouble is turns_with_kazoo:
        turns_with_kazoo(fleet)
        return
    holder, since = fleet.holder(), now()
    for within in trouble(fleet, holder):
        if within:
            fleet.successor(holder, since, within)
    fleet.settle()
    two, when = fleet.overlap()
    if two > 0:
        raise AssertionError("two held for %.3f s, %.3f s after the trouble began"
                             % (two, when - since))


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    if os.geteuid() != 0:
        print("skipped: network namespaces need root\n0 passed, 0 failed")
        return 0
    if "CRPC_LEASE_INSIDE" not in os.environ:
        os.environ["CRPC_LEASE_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "-nm", sys.executable, *sys.argv])
    logging.disable(logging.CRITICAL)       # kazoo's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _build.programs(os.path.dirname(CONTENDER), ["-O1", "-fsanitize=address,undefined",
                                                 "-fno-sanitize-recover=all"],
                    "crpc_impl_tests/system/contender.c", zookeeper=True)
    make_network()
    wildcard = os.environ.get("CRPC_TEST_FILTER") or "*"
    passed = failed = 0
    directory = tempfile.mkdtemp(prefix="crpc-lease.")
    fleet = Fleet(directory)
    for trouble in TROUBLES + ONCE:
        times = 1 if trouble in ONCE else count
        for number in range(times if fnmatch.fnmatch(trouble.__name__, wildcard) else 0):
            begin = now()
            try:
                test(fleet, trouble)
                passed += 1
                print("ok   %s %d (%.1f s)" % (trouble.__name__, number + 1, now() - begin),
                      flush=True)
            except AssertionError as why:
                failed += 1
                print("FAIL %s %d, begun at %d: %s" % (trouble.__name__, number + 1, begin * 1e6,
                                                       why))
                for contender in fleet.contenders:
                    print("---", contender.server.host, contender.server.mode())
                    print("\n".join(contender.text().split("\n")[-20:]))
                break   # what is left behind would fail the next one
        if failed:
            break
    if not failed:
        fleet.end()
    shutil.rmtree(directory, ignore_errors=True)
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
