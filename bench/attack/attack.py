#!/usr/bin/python3
"""Besets a server with one attack after the other, and measures honest calls meanwhile. `make attack`
calls it; by hand:

    attack.py [--attacks A,B] [--configs 0/0,2/4] [--windows N] [--seconds S] [--verbose] [--quick]

attackers.py says what each attack tries. A configuration is io_threads/workers. For each attack and
configuration the capacity of the server is measured; a fifth of it is the honest load: an open loop
of crpc_press at 127.0.0.1, over four connections. Then windows alternate: in one the attacker besets
the server, in the next the same attacker besets an inert sink, so that what the attacker takes of the
machine is in both. Each window has a server of its own. Attacker and sink run at nice 19, and the
honest client connects when the attack is under way. In the last window the attacker is then stopped
by SIGSTOP, so that it holds what it has; what the server does now is idle. At last the server is told
to stop, with all that is held.

What must be true of each attack and configuration:
  answered   99.5 % of the honest calls, within their deadline of a second
  p99        of the honest calls, from when each was due: the median of the windows is at most 3 times
             that of the windows with the sink, and 5 ms
  memory     the server's RSS grows by no more than max_bytes for each loop that serves, and 16 MiB
  idle       the server takes 2 % of a core at most
  stop       the server ends with status 0 within drain_ms and 1.2 s: for a second it sends the answers
             to what is still in service

--quick takes one window without a sink, a fixed low rate and looser limits, and does not judge p99, so
that a busy machine does not decide. The last line is "N passed, N failed", counting attacks times
configurations. An attack also counts as failed where the honest calls beside the sink do not reach
the limit, or the attacker needs more than 5 s to take its first hold: the machine is too busy to tell.
"""
import argparse
import ctypes
import json
import os
import re
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import attackers

HERE = os.path.dirname(os.path.abspath(__file__))
ECHO = "example.EchoService.Echo"
CONFIGS = ["0/0", "0/4", "2/0", "2/4"]
QUICK_CONFIGS = ["0/4"]
MIB = 1 << 20
MAX_BYTES = 256 * MIB       # the server's default, for each loop
BESIDE_BUFFERS = 16 * MIB   # RSS that may come on top: stacks, connections, pages of the program
DRAIN_MS = 3000             # of attacks with stop_s, which must be less; of all in the long form
QUICK_DRAIN_MS = 300
READY_S = 5                 # that an attacker may take for its set-up
DEADLINE_MS = 1000


class Limits:
    """What is required, in the long form and in the quick one."""

    def __init__(self, quick):
        self.answered = 90 if quick else 99.5
        self.idle = 20 if quick else 2
        self.beyond_drain_s = 3 if quick else 1.2


# --- processes ------------------------------------------------------------------------------------

def prepare(nice=0):
    """For Popen: not outliving this one, with many descriptors, unable to take all memory."""
    def run():
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        os.nice(nice)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    return run


class Child:
    """A process that says a line, or more, when it is ready."""

    def __init__(self, command, nice=0, **more):
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        preexec_fn=prepare(nice), **more)
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def lines(self, count, seconds):
        """The first `count` lines, or what came of them in time."""
        said, end = b"", time.monotonic() + seconds
        while said.count(b"\n") < count and select.select(
                [self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
            piece = os.read(self.process.stdout.fileno(), 4096)
            if not piece:
                break
            said += piece
        return said.decode().splitlines()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in self.process.stdout, self.process.stderr:
            if pipe:
                pipe.close()


class Server(Child):
    def __init__(self, bench, config, attack, directory):
        io_threads, workers = config.split("/")
        path = os.path.join(directory, "server")
        if os.path.exists(path):
            os.unlink(path)     # of a server that was killed
        options = "io_threads=%s\nworkers=%s\ndrain_ms=%d\n" % (
            io_threads, workers, bench.drain_ms(attack))
        super().__init__([bench.server, options, "tcp://127.0.0.1:0", "unix://" + path],
                         stderr=subprocess.PIPE if attack.stderr_pipe else subprocess.DEVNULL)
        lines = self.lines(2, 10)
        if len(lines) != 2:
            self.kill()
            sys.exit("attack.py: the server did not start: " + " ".join(lines))
        self.url = lines[0].split("listening on ")[1]
        self.target = path if attack.over == "unix" else self.url.split("://")[1]
        self.loops = max(1, int(io_threads))
        self.memory_before = self.memory("VmRSS")

    def memory(self, what):
        """In bytes; 0 of a server that has died."""
        try:
            with open("/proc/%d/status" % self.pid) as status:
                return next((int(line.split()[1]) << 10 for line in status
                             if line.startswith(what + ":")), 0)
        except OSError:
            return 0

    def growth(self):
        return max(0, self.memory("VmHWM") - self.memory_before)

    def cpu(self):
        """Seconds that its threads have run; raises OSError if it, or one of them, has ended."""
        total = 0
        for thread in os.listdir("/proc/%d/task" % self.pid):
            with open("/proc/%d/task/%s/schedstat" % (self.pid, thread)) as f:
                total += int(f.read().split()[0])
        return total / 1e9

    def idle(self, enough):
        """Percent of a core. What was begun may take a while to end, hence several tries."""
        least = 100.0
        for _ in range(6):
            began, before = time.monotonic(), self.cpu()
            time.sleep(0.5)
            least = min(least, (self.cpu() - before) / (time.monotonic() - began) * 100)
            if least <= enough:
                break
        return least

    def stop(self, seconds):
        """(how long it took to end, None or what was wrong)"""
        began = time.monotonic()
        self.process.terminate()
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return seconds, "no end after %.1f s" % seconds
        return time.monotonic() - began, None if status == 0 else "status %d" % status


class Sink(Child):
    def __init__(self, attack, directory):
        path = os.path.join(directory, "sink")
        if os.path.exists(path):
            os.unlink(path)
        super().__init__([sys.executable, attackers.__file__, "sink", path], 19)
        port = self.lines(1, 10)
        if not port:
            sys.exit("attack.py: the sink did not start")
        self.target = path if attack.over == "unix" else "127.0.0.1:" + port[0]


class Attacker(Child):
    def __init__(self, attack, target, loops):
        super().__init__([sys.executable, attackers.__file__, attack.__name__, target, str(loops)],
                         19)
        self.ready = bool(self.lines(1, READY_S))


# --- measurements ---------------------------------------------------------------------------------

class Honest:
    """What crpc_press has seen, of one run."""

    def __init__(self, summary, expected, complaint=""):
        self.ok = summary.get("ok", 0)
        self.due = summary.get("sent", 0) + summary.get("not_sent", 0) or expected
        self.rate = summary.get("calls_per_s", 0)
        self.failures = dict(summary.get("failures", {}), **(
            {"not sent": summary["not_sent"]} if summary.get("not_sent") else {}))
        if not summary:     # crpc_press gives up if its first call gets no reply
            found = re.search(r"the first call: (\w+)", complaint)
            self.failures["first call: " + found.group(1) if found else "crpc_press hung"] = expected
        # failures of the client's own, such as ECONN, are no latencies: they show in `answered`
        self.p99 = (summary["latency_us"]["p99"] / 1000 if self.ok else float(DEADLINE_MS))


class Row:
    """One attack in one configuration."""

    def __init__(self, attack, config, rate):
        self.attack, self.config, self.rate = attack, config, rate
        self.attacked, self.beside_sink = [], []    # Honest, one for each window
        self.growth = 0
        self.unready = 0        # windows in which the attacker was not ready in time
        self.idle = self.stop = None
        self.wrong = []

    def p99(self, windows):
        return statistics.median(w.p99 for w in windows) if windows else float("nan")

    @staticmethod
    def answered(windows):
        return 100 * sum(w.ok for w in windows) / sum(w.due for w in windows) if windows else 0.0

    def judge(self, limits):
        loops = max(1, int(self.config.split("/")[0]))
        answered, p99 = self.answered(self.attacked), self.p99(self.attacked)
        if answered < limits.answered:
            self.wrong.append("answered")
        if self.beside_sink and self.answered(self.beside_sink) < limits.answered:
            self.wrong.append("busy machine: answered beside the sink")
        if self.beside_sink and self.unready:
            self.wrong.append("busy machine: attacker not ready in %d windows" % self.unready)
        if self.beside_sink and p99 > 3 * self.p99(self.beside_sink) + 5:
            self.wrong.append("p99")
        if self.growth > MAX_BYTES * loops + BESIDE_BUFFERS:
            self.wrong.append("memory")
        if self.idle is not None and self.idle > limits.idle:
            self.wrong.append("idle")

    def failures(self):
        """The most frequent reasons of honest calls that failed under attack."""
        total = {}
        for window in self.attacked:
            for name, count in window.failures.items():
                total[name] = total.get(name, 0) + count
        return ", ".join("%s %d" % item for item in
                         sorted(total.items(), key=lambda item: -item[1])[:2])

    HEAD = "%-10s %-4s %8s %9s %7s %8s %8s %7s %6s %6s  %s" % (
        "attack", "io/w", "calls/s", "answered", "(sink)", "p99 ms", "(sink)", "MiB", "idle %",
        "stop s", "")

    def __str__(self):
        number = lambda value, form: "-" if value is None or value != value else form % value
        sink = self.answered(self.beside_sink) if self.beside_sink else None
        return ("%-10s %-4s %8.0f %9.2f %7s %8.1f %8s %7.0f %6s %6s  %s" % (
            self.attack.__name__, self.config, self.rate, self.answered(self.attacked),
            number(sink, "%.2f"), self.p99(self.attacked), number(self.p99(self.beside_sink), "%.1f"),
            self.growth / MIB, number(self.idle, "%.1f"), number(self.stop, "%.1f"),
            "FAILED: %s  %s" % (", ".join(self.wrong), self.failures()) if self.wrong else "ok"
        )).rstrip()


class Bench:
    def __init__(self, options):
        self.options = options
        self.limits = Limits(options.quick)
        self.server = os.path.join(options.build, "attack_server")
        self.press_program = os.path.join(options.build, "crpc_press")
        for program in self.server, self.press_program:
            if not os.path.exists(program):
                sys.exit("attack.py: %s is not built: call `make attack`" % program)

    def drain_ms(self, attack):
        return QUICK_DRAIN_MS if self.options.quick and not attack.stop_s else DRAIN_MS

    def press(self, url, attack, seconds, *load, expected=1):
        command = [self.press_program, url, ECHO, "--text-field", "1=honest", "--json", "--quiet",
                   "--timeout-ms", str(DEADLINE_MS), "--connections", "4", "--warmup", "0.1",
                   "--duration", str(seconds), *attack.honest, *load]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  stdin=subprocess.DEVNULL, timeout=seconds + 20,
                                  preexec_fn=prepare())
            return Honest(json.loads(done.stdout or "{}"), expected, done.stderr.decode())
        except subprocess.TimeoutExpired:
            return Honest({}, expected)

    def capacity(self, attack, config):
        """Calls a second, 64 at a time; the honest load is a fifth of it."""
        with Server(self, config, attack, self.directory) as server:
            return self.press(server.url, attack, 0.5, "--concurrency", "64").rate

    def honest(self, server, row):
        seconds = self.options.seconds
        return self.press(server.url, row.attack, seconds, "--rate", "%d" % row.rate,
                          expected=int(row.rate * seconds))

    def window(self, row, last):
        """Honest calls beside the attack; the last window goes on to idling and to a stop."""
        with Server(self, row.config, row.attack, self.directory) as server:
            with Attacker(row.attack, server.target, server.loops) as attacker:
                row.unready += not attacker.ready
                row.attacked.append(self.honest(server, row))
                row.growth = max(row.growth, server.growth())
                died = server.process.poll()
                if died is not None:
                    row.wrong.append("died with %d" % died)
                elif last:
                    os.kill(attacker.pid, signal.SIGSTOP)
                    try:
                        row.idle = server.idle(self.limits.idle)
                    except OSError:
                        row.wrong.append("died while idle")
                    self.stop(server, row)

    def stop(self, server, row):
        most = row.attack.stop_s or self.drain_ms(row.attack) / 1000 + self.limits.beyond_drain_s
        row.stop, wrong = server.stop(most)
        if wrong:
            row.wrong.append("stop: " + wrong)

    def window_beside_sink(self, row):
        with Server(self, row.config, row.attack, self.directory) as server, \
                Sink(row.attack, self.directory) as sink, \
                Attacker(row.attack, sink.target, server.loops):
            row.beside_sink.append(self.honest(server, row))

    def run_one(self, attack, config):
        quick = self.options.quick
        rate = 1000 if quick else max(100, self.capacity(attack, config) / 5)
        row = Row(attack, config, rate)
        for number in range(self.options.windows):
            if not quick:
                self.window_beside_sink(row)
            self.window(row, number == self.options.windows - 1)
            if self.options.verbose:
                sink = row.beside_sink[-1:] or [None]
                print("  window %d: p99 %.2f ms, with the sink %s" % (
                    number + 1, row.attacked[-1].p99, sink[0] and "%.2f" % sink[0].p99))
        row.judge(self.limits)
        return row

    def run(self):
        began, rows, left_out = time.monotonic(), [], 0
        print(Row.HEAD, flush=True)
        for attack in self.options.attacks:
            for config in self.options.configs:
                if time.monotonic() - began > self.options.budget:
                    left_out += 1
                    continue
                with tempfile.TemporaryDirectory() as self.directory:
                    rows.append(self.run_one(attack, config))
                print(rows[-1], flush=True)
        for attack in self.options.attacks:
            print("%-10s %s" % (attack.__name__, attack.__doc__))
        if left_out:
            print("%d not measured, counted as failed: %d s are over" % (left_out,
                                                                        self.options.budget))
        print("%.0f s, load average %.1f" % (time.monotonic() - began, os.getloadavg()[0]))
        failed = sum(1 for row in rows if row.wrong) + left_out
        print("%d passed, %d failed" % (len(rows) + left_out - failed, failed))
        return failed


def main():
    def classes(names):
        unknown = set(names.split(",")) - set(attackers.ATTACKS)
        if unknown:
            raise argparse.ArgumentTypeError("no attack " + ", ".join(unknown))
        return [attackers.ATTACKS[name] for name in names.split(",")]

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build/bench", help="where the programs are")
    parser.add_argument("--quick", action="store_true", help="one window, only robust verdicts")
    parser.add_argument("--attacks", type=classes, default=list(attackers.ATTACKS.values()))
    parser.add_argument("--configs", type=lambda text: text.split(","))
    parser.add_argument("--windows", type=int, help="of each kind; 7 by default")
    parser.add_argument("--seconds", type=float, help="of each window; 1 by default")
    parser.add_argument("--budget", type=float, help="seconds after which nothing new begins")
    parser.add_argument("--verbose", action="store_true", help="print each window")
    options = parser.parse_args()
    options.configs = options.configs or (QUICK_CONFIGS if options.quick else CONFIGS)
    options.windows = options.windows or (1 if options.quick else 7)
    options.seconds = options.seconds or (0.3 if options.quick else 1)
    options.budget = options.budget or (120 if options.quick else 2600)
    return 1 if Bench(options).run() else 0


if __name__ == "__main__":
    sys.exit(main())
