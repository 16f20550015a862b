#!/usr/bin/python3
"""Measures crpc beside its peers and a floor of raw sockets. `make bench` builds and calls it; by hand:

    bench/run.py [--build DIR] [--quick] [--rounds N] [--seconds S] [--peers A,B] [--scenarios A,B]

Each round goes through all scenarios, each scenario through all peers, so that a disturbance hits
everybody alike; what is reported is the median over the rounds. For each measurement a server is
started anew and a client calls it, first for a while unmeasured, comparing every reply. The server is
pinned to one core and the client to another (with _1core: both to one).

Writes a table, DIR/report.json and DIR/report.html. bench.h tells what the kinds of load are.
`vs_floor` is p50 over the floor's p50 for sync_*, p99 over the floor's p99 for open_half, and calls per
second over the floor's otherwise. The exit status is 1 if crpc or the floor could not be measured.
"""
import argparse
import collections
import ctypes
import json
import os
import platform
import re
import selectors
import signal
import statistics
import subprocess
import sys
import time

import report

Scenario = collections.namedtuple("Scenario", "name kind size number cores about")
SCENARIOS = [Scenario(*s) for s in [
    ("sync_1core", "sync", 32, 0, 1, "one call at a time, 32 bytes, client and server on one core"),
    ("sync_2core", "sync", 32, 0, 2, "one call at a time, 32 bytes, a core each"),
    ("pipe64", "pipe", 32, 64, 2, "64 calls outstanding on one connection, a core each"),
    ("pipe64_1core", "pipe", 32, 64, 1, "64 calls outstanding on one connection, one core"),
    ("open_half", "open", 32, None, 2, "calls that arrive at half of the peer's own pipe64 rate"),
    ("conns16", "conns", 32, 16, 2, "16 threads with a connection each"),
    ("threads16", "threads", 32, 16, 2, "16 threads that share one connection"),
    ("msg4k", "pipe", 4096, 64, 2, "64 messages of 4 KiB outstanding"),
    ("msg1m", "sync", 1 << 20, 0, 2, "messages of 1 MiB, one at a time"),
    ("att1m", "attach", 1 << 20, 0, 2, "attachments of 1 MiB, one at a time"),
    ("storm", "storm", 32, 2000, 2, "connect, call once, disconnect"),
    ("idle1k", "idle", 32, 1000, 2, "one call at a time beside 1000 idle connections"),
    ("idle10k", "idle", 32, 9900, 2, "one call at a time beside 9900 idle connections"),
    ("providers1", "providers", 32, 1, 2, "pipe64 through a list of one provider"),
    ("providers10", "providers", 32, 10, 2, "pipe64 through a list of 10 providers"),
    ("providers1000", "providers", 32, 1000, 2, "pipe64 through a list of 1000 providers"),
]]

# The same load in three ways; `floor` is the best of them.
FLOORS = ["floor_window", "floor_lockstep", "floor_unbatched"]
PEERS = ["crpc", "tirpc", "zmq", "nng", "thrift", "grpc_cq", "grpc_sync", "capnp"]
QUICK_PEERS = ["crpc", "tirpc", "zmq"]
QUICK_LEAVES_OUT = ["storm", "idle10k", "providers1", "providers10", "providers1000"]


class Failure(Exception):
    pass


def programs(build, peer):
    """(server command, client command, environment) of a peer."""
    base = re.sub("_.*", "", peer)
    server, client = [os.path.join(build, base + end) for end in ("_server", "_client")]
    argument = {"floor_unbatched": ["unbatched"], "grpc_cq": ["cq"], "grpc_sync": ["sync"]}
    more = argument.get(peer, [])
    return [server] + more, [client], dict(os.environ, **{"BENCH_" + m.upper(): "1" for m in more})


NICE = 0


def pinned(core):
    """For Popen: on one core, with all the descriptors it may have, and not outliving this one."""
    import resource

    def prepare():
        os.sched_setaffinity(0, {core})
        os.nice(NICE)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return prepare


class Server:
    """A server of a peer, from its start until it is stopped."""

    def __init__(self, command, environment, core):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                        env=environment, preexec_fn=pinned(core))
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if ready.select(10) else b""
        if not line.strip().isdigit():
            self.stop()
            raise Failure("the server did not start")
        self.port, self.pid = int(line), self.process.pid

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def kind_and_number(peer, scenario, rate):
    kind, number = scenario.kind, scenario.number
    if peer == "floor_lockstep" and kind == "pipe":
        kind = "lockstep"
    if peer == "floor" and kind == "threads":
        kind = "conns"      # the floor has nothing to share
    return kind, int(rate / 2) if kind == "open" else number


def measure(build, peer, scenario, seconds, cores, rate):
    """One run: the client's result, or None if the peer cannot do it."""
    command, client, environment = programs(build, peer)
    kind, number = kind_and_number(peer, scenario, rate)
    if kind == "providers":
        command = command + [str(number)]
    server = Server(command, environment, cores[0])
    try:
        done = subprocess.run(client + [str(a) for a in (server.port, server.pid, kind,
                                                         scenario.size, seconds, number)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=seconds + 60,
                              stdin=subprocess.DEVNULL, env=environment,
                              preexec_fn=pinned(cores[scenario.cores - 1]))
    except subprocess.TimeoutExpired:
        raise Failure("the client did not end")
    finally:
        server.stop()
    if done.returncode == 3:
        return None
    if done.returncode != 0:
        raise Failure(done.stderr.decode(errors="replace").strip()[-200:] or
                      "the client ended with %d" % done.returncode)
    return json.loads(done.stdout)


def idle(command, environment, core):
    """(RSS, anonymous memory, threads) of a server that nobody has called yet."""
    server = Server(command, environment, core)
    try:
        time.sleep(0.05)
        with open("/proc/%d/smaps_rollup" % server.pid) as f:
            kb = dict(re.findall(r"^(\w+): +(\d+) kB", f.read(), re.M))
        return int(kb["Rss"]), int(kb["Anonymous"]), len(os.listdir("/proc/%d/task" % server.pid))
    finally:
        server.stop()


def footprint(build, peer, cores):
    """What a server takes, and what it needs on disk. How many pages of libc the kernel maps around
    those that are used differs from start to start: the least of a few is the server's own."""
    command, _, environment = programs(build, peer)
    rss, anonymous, threads = min(idle(command, environment, cores[0]) for _ in range(8))
    stripped = command[0] + ".stripped"
    subprocess.run(["strip", "-o", stripped, command[0]], check=True)
    size = os.path.getsize(stripped)
    os.unlink(stripped)
    needs = subprocess.run(["ldd", command[0]], stdout=subprocess.PIPE).stdout.decode()
    for name, path in re.findall(r"(\S+) => (/\S+)", needs):
        if not re.match(r"lib(c|m|pthread|dl|rt)\.so", name):
            size += os.path.getsize(path)
    return {"rss_kb": rss, "anon_kb": anonymous, "threads": threads, "disk_kb": size // 1024}


class Bench:
    def __init__(self, options):
        self.options = options
        self.scenarios = [s for s in SCENARIOS if (s.name in options.scenarios if options.scenarios
                                                   else not options.quick or
                                                   s.name not in QUICK_LEAVES_OUT)]
        self.peers = options.peers or (QUICK_PEERS if options.quick else PEERS)
        self.skipped, self.failed, self.cannot = {}, {}, set()
        self.runs = collections.defaultdict(list)       # (scenario, peer): results
        usable = sorted(os.sched_getaffinity(0))
        self.cores = (usable + usable)[:2]
        for peer in ["floor"] + self.peers:
            for path in sum((p[:1] for p in programs(options.build, peer)[:2]), []):
                if not os.path.exists(path):
                    self.skipped[peer] = "not built: its packages are missing or do not fit"
        self.peers = [p for p in self.peers if p not in self.skipped]
        if "floor" in self.skipped:
            sys.exit("run.py: the floor is not built: call `make bench`")

    def variants(self, scenario):
        return (FLOORS if scenario.kind == "pipe" else ["floor"]) + self.peers

    def run_one(self, scenario, peer, seconds):
        if (scenario.name, peer) in self.cannot:
            return
        rate = 0
        if scenario.kind == "open":
            pipe = [self.runs["pipe64", p][-1]["calls_per_s"] for p in [peer] + FLOORS[:2]
                    if self.runs["pipe64", p] and p.startswith(peer)]
            if not pipe:
                return
            rate = max(pipe)
        try:
            result = measure(self.options.build, peer, scenario, seconds, self.cores, rate)
        except Failure as e:
            self.failed[scenario.name, peer] = str(e)
            self.cannot.add((scenario.name, peer))
            print("  FAILED %s, %s: %s" % (peer, scenario.name, e), file=sys.stderr)
            return
        if result is None:
            self.cannot.add((scenario.name, peer))
        else:
            self.runs[scenario.name, peer].append(result)

    def run(self):
        began = time.monotonic()
        self.rounds = 0
        for number in range(self.options.rounds):
            if not sys.stderr.isatty():
                print("round %d of %d, after %d s" % (number + 1, self.options.rounds,
                                                      time.monotonic() - began), flush=True)
            for scenario in self.scenarios:
                self.progress("round %d of %d: %s" % (number + 1, self.options.rounds,
                                                       scenario.name))
                for peer in self.variants(scenario):
                    self.run_one(scenario, peer, self.options.seconds)
            self.rounds += 1
            self.took = time.monotonic() - began
            if self.options.budget and self.took * (number + 2) / (number + 1) > self.options.budget:
                break       # another round would take too long
        self.progress("")

    @staticmethod
    def progress(text):
        """On a terminal: one line that changes."""
        if sys.stderr.isatty():
            print("\r\033[K" + text, end="", file=sys.stderr, flush=True)

    def rows(self):
        rows = []
        for scenario in self.scenarios:
            found = {p: self.median(scenario, p) for p in self.variants(scenario)
                     if self.runs[scenario.name, p]}
            floors = [found[p] for p in FLOORS if p in found]
            if floors:
                found = dict({"floor": dict(max(floors, key=lambda r: r["calls_per_s"]),
                                            peer="floor")}, **found)
            for row in found.values():
                key = row["vs_floor_of"]
                base = found.get("floor", {}).get(key)
                row["vs_floor"] = round(row[key] / base, 4) if base else None
                rows.append(row)
        for peer in ["floor"] + self.peers:
            rows.append(dict(peer=peer, scenario="footprint",
                             **footprint(self.options.build, peer, self.cores)))
        return rows

    def median(self, scenario, peer):
        runs = self.runs[scenario.name, peer]
        row = {"peer": peer, "scenario": scenario.name}
        for key in runs[0]:
            row[key] = round(statistics.median(r[key] for r in runs), 4)
        row["vs_floor_of"] = ("p50_us" if scenario.kind == "sync" and scenario.cores and
                              scenario.name.startswith("sync") else
                              "p99_us" if scenario.kind == "open" else "calls_per_s")
        values = [r[row["vs_floor_of"]] for r in runs]
        row["spread"] = round((max(values) - min(values)) / statistics.median(values), 3)
        row["rounds"] = len(runs)
        return row


def machine():
    cpu = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    return {"cpu": cpu.group(1) if cpu else platform.machine(), "cores": os.cpu_count(),
            "kernel": platform.release(), "date": time.strftime("%Y-%m-%d %H:%M"),
            "load": os.getloadavg()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")
    parser.add_argument("--build", default="build/bench", help="where the programs are")
    parser.add_argument("--quick", action="store_true", help="few peers and scenarios, short runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="of each run")
    parser.add_argument("--budget", type=float, help="seconds; fewer rounds if they would not do")
    parser.add_argument("--nice", type=int, default=0, help="added to the niceness of what is measured")
    parser.add_argument("--peers", type=names)
    parser.add_argument("--scenarios", type=names)
    options = parser.parse_args()
    global NICE
    NICE = options.nice
    options.seconds = options.seconds or (0.05 if options.quick else 0.4)

    bench = Bench(options)
    about = machine()
    bench.run()
    rows = bench.rows()
    about.update(took=bench.took, load_after=os.getloadavg()[0], rounds=bench.rounds,
                 seconds=options.seconds, skipped=bench.skipped, same_core=len(set(bench.cores)) == 1,
                 failed=[(s, p, why) for (s, p), why in bench.failed.items()],
                 scenarios=[(s.name, s.about) for s in SCENARIOS])
    with open(os.path.join(options.build, "report.json"), "w") as f:
        json.dump(rows, f, indent=1)
    with open(os.path.join(options.build, "report.html"), "w") as f:
        f.write(report.page(rows, about))
    print(report.table(rows, about))
    print("%s/report.json, %s/report.html" % (options.build, options.build))
    return any(p in ("crpc", "floor") for _, p in bench.failed)


if __name__ == "__main__":
    sys.exit(main())
