#!/usr/bin/python3
"""Measures what crpc takes of a board: code for three processors, a static server, memory. `make
size` calls it; by hand:

    bench/footprint.py [--update] [--build DIR] [--jobs N] [WORD...]

WORD: only figures whose name holds all the words. BUILD/bench/footprint and BUILD/examples/echo_server
have to be there.

code      `size`'s text (code and constants) of an object that holds nothing but crpc, at -Os and
          without tables for unwinding. What of it a program does not use, --gc-sections removes.
          Small is without POLICY and TEXTS, smallest also without THREADS and EPOLL. A table shows
          the sections of crpc.h on armv7, and what each toggle takes away when it alone is off.
stack     of armv7: the deepest way through crpc's own functions, by bench/stack.py, for a
          synchronous call, opening a channel, a server's threads, and any public function.
nanopb    the three objects of the system's library, which Debian compiles with -O2; for other
          processors there is none to look at, and about 8 KB at -Os on thumb2.
server    examples/echo/echo_server.c, linked statically with musl, without a resolver of names: the
          stripped file.
memory    of that, of the usual build, and of connections and calls, with what malloc adds.

A figure fails if it is over its ceiling, or more than 3 % over baseline/size.json; the latter only
where the compiler is the baseline's.
"""
import argparse
import concurrent.futures
import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import stack

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
BASELINE = os.path.join(HERE, "baseline", "size.json")
LIMIT = 3.0         # per cent
SHOWN = 16          # functions named where a ceiling is not met
KIB = 1024

OS_FLAGS = ["-std=c99", "-Os", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]
TARGETS = {
    "x86-64": ("gcc", [], ""),
    "armv7": ("arm-linux-gnueabihf-gcc", ["-mthumb", "-march=armv7-a+fp"], "arm-linux-gnueabihf-"),
    "mips": ("mips-linux-gnu-gcc", [], "mips-linux-gnu-"),
}
FEATURES = {
    "client": ["-DCRPC_ENABLE_SERVER=0", "-DCRPC_ENABLE_ZOOKEEPER=0", "-DCRPC_ENABLE_SERVERLESS=0"],
    "client and server": ["-DCRPC_ENABLE_ZOOKEEPER=0", "-DCRPC_ENABLE_SERVERLESS=0"],
    "everything": ["-DTHREADED"],
}
SMALL = ["-DCRPC_ENABLE_POLICY=0", "-DCRPC_ENABLE_TEXTS=0"]
SMALLEST = SMALL + ["-DCRPC_ENABLE_THREADS=0", "-DCRPC_ENABLE_EPOLL=0"]
ARM_FEATURES = {name + size: FEATURES[name] + less for name in ("client", "client and server")
                for size, less in ((", small", SMALL), (", smallest", SMALLEST))}
# Of "everything"; threads come with the other ZooKeeper client.
TOGGLES = ["EPOLL", "CLIENT", "SERVER", "ZOOKEEPER", "SERVERLESS", "RESOLVER", "POLICY", "TEXTS"]
STACKS = {
    "a synchronous call": r"crpc_channel_call",
    "opening a channel": r"crpc_channel_open",
    "a server's threads": r"crpci_\w+_thread",
    "any public function": r"crpc_\w+",
}

# Bytes. Without HTTP, which does not exist yet. Everything is bounded by the baseline.
CEILINGS = {
    "code armv7: client": 46 * KIB,
    "code armv7: client and server": 64 * KIB,
    "code armv7: client, small": 34 * KIB,
    "code armv7: client and server, small": 45 * KIB,
    "code armv7: client, smallest": 31 * KIB,
    "code armv7: client and server, smallest": 42 * KIB,
    "server musl: file": 128 * KIB,
    "server musl: idle RSS": 400 * KIB,
    "server: idle RSS": 1536 * KIB,
    "server: idle anonymous": 250 * KIB,
    "memory: a connection": 512,
    "memory: a connection that was used": 512,
}
CEILINGS.update(("stack armv7, %s: %s" % (features, what), 4 * KIB)
                for features in ("client and server", "everything") for what in STACKS)
# Pages that the kernel happens to have mapped: a few more or less are no change.
SLACK = {"RSS": 64 * KIB, "anonymous": 16 * KIB}


def run(command, **more):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          stdin=subprocess.DEVNULL, **more)
    if done.returncode:
        sys.exit("footprint.py: %s\n%s" % (" ".join(command), done.stdout))
    return done.stdout


class Footprint:
    def __init__(self, build):
        self.build = os.path.abspath(build)
        self.dir = os.path.join(self.build, "size")
        self.include = os.path.join(self.dir, "include")
        shutil.rmtree(self.dir, ignore_errors=True)
        os.makedirs(self.include)
        # The headers of nanopb and ZooKeeper alone: a cross compiler must not see this libc's.
        for header in glob.glob("/usr/include/pb*.h") + glob.glob("/usr/include/nanopb/pb*.h"):
            shutil.copy(header, self.include)
        shutil.copytree("/usr/include/zookeeper", os.path.join(self.include, "zookeeper"))
        self.source = os.path.join(self.dir, "crpc.c")
        with open(self.source, "w") as f:
            f.write('#define CRPC_IMPLEMENTATION\n#include "crpc.h"\n')
        with open(os.path.join(ROOT, "crpc.h")) as f:
            self.header = f.read().split("\n")
        self.banners = [(number + 1, found.group(1)) for number, found in enumerate(
            re.match(r"/\* >>impl-(\w+) ", line) for line in self.header) if found]
        self.columns = {}       # features: {section: bytes}, of armv7
        self.without = {}       # toggle: bytes of everything but it, of armv7
        self.largest = {}       # figure: what is behind it
        self.splits = {}        # figure: what it consists of

    def compile(self, target, name, flags):
        """The object, with its call graph beside it."""
        compiler, machine, _ = TARGETS[target]
        output = os.path.join(self.dir, "%s-%s.o" % (target, re.sub(r"\W+", "-", name)))
        run([compiler] + OS_FLAGS + machine + flags + ["-fcallgraph-info=su", "-I" + ROOT,
            "-I" + self.include, "-c", self.source, "-o", output])
        return output

    def text(self, target, output):
        """`size`'s text, data, bss."""
        return run([TARGETS[target][2] + "size", output]).splitlines()[1].split()[:3]

    def code(self, target, features):
        """{figure: bytes} of one object."""
        name = "code %s: %s" % (target, features)
        output = self.compile(target, features, {**FEATURES, **ARM_FEATURES}[features])
        text, data, bss = self.text(target, output)
        self.splits[name] = "data %s, bss %s" % (data, bss)
        sections = self.sections(target, output)
        sections["constants"] = int(text) - sum(sections.values())
        ranked = sorted(sections.items(), key=lambda s: -s[1])
        self.largest[name] = ["%6d %s" % (size, section) for section, size in ranked[:SHOWN]]
        if target == "armv7":
            self.columns[features] = sections
        figures = {name: int(text)}
        if target == "armv7" and features in ("client and server", "everything"):
            figures.update(self.stack(output, features))
        return figures

    def sections(self, target, output):
        """{section: bytes of its functions and tables}: by the lines where functions stand, else by
        the prefix."""
        with open(output[:-2] + ".ci") as f:
            lines = {name: int(line) for name, line in re.findall(
                r'label: "([\w.]+)\\n[^"]*?crpc\.h:(\d+):', f.read())}
        found = {}
        for line in run([TARGETS[target][2] + "nm", "-S", output]).splitlines():
            fields = line.split()
            if len(fields) != 4 or fields[2] not in "tTrR":
                continue
            section = re.sub(r"crpci_([a-z0-9]+).*", r"\1", fields[3].split(".")[0])
            if fields[3] in lines:
                section = self.section_at(lines[fields[3]])
            found[section] = found.get(section, 0) + int(fields[1], 16)
        return found

    def section_at(self, line):
        return next((name for first, name in reversed(self.banners) if first <= line), "?")

    def stack(self, output, features):
        """{figure: bytes} of the deepest ways."""
        with open(output[:-2] + ".ci") as f:
            found = stack.Stack(f.read(), "\n".join(self.header))
        if found.unknown:
            sys.exit("footprint.py: bench/stack.py does not know what is called: " +
                     ", ".join(sorted(found.unknown)))
        ways, figures = found.roots(), {}
        for what, pattern in STACKS.items():
            name = "stack armv7, %s: %s" % (features, what)
            root = max((r for r in ways if re.fullmatch(pattern, r)), key=lambda r: ways[r][0])
            figures[name] = ways[root][0]
            self.splits[name] = root
            self.largest[name] = ["%6d %s" % (size, function) for function, size in ways[root][1]
                                  if size >= 64]
        return figures

    def toggle(self, name):
        """What a toggle takes from everything."""
        output = self.compile("armv7", "no-" + name,
                              FEATURES["everything"] + ["-DCRPC_ENABLE_%s=0" % name])
        self.without[name] = int(self.text("armv7", output)[0])
        return {}

    def tables(self):
        """Bytes of armv7 by section and by toggle."""
        columns = [c for c in (list(FEATURES) + list(ARM_FEATURES)) if c in self.columns]
        print("\narmv7, bytes by section: " + "; ".join(
            "(%d) %s" % (i + 1, c) for i, c in enumerate(columns)))
        rows = sorted({s for c in columns for s in self.columns[c]},
                      key=lambda s: -max(self.columns[c].get(s, 0) for c in columns))
        for row in rows:
            print("%-14s" % row + "".join(
                "%8s" % (self.columns[c].get(row) or "") for c in columns))
        print("%-14s" % "all" + "".join("%8d" % sum(self.columns[c].values()) for c in columns))
        everything = sum(self.columns.get("everything", {}).values())
        if self.without and everything:
            print("\narmv7, everything (%d) without: " % everything + ", ".join(
                "%s %+d" % (name, self.without[name] - everything)
                for name in TOGGLES if name in self.without))

    def nanopb(self):
        library = "/usr/lib/%s-linux-gnu/libprotobuf-nanopb.a" % platform.machine()
        last = run(["size", "-t", library]).splitlines()[-1]
        return {"nanopb %s, the system's" % platform.machine().replace("_", "-"):
                int(last.split()[0])}

    def musl(self):
        """The static server, and its parts from the linker's map."""
        name, output = "server musl: file", os.path.join(self.dir, "echo_server-musl")
        generated = os.path.join(self.build, "gen", "examples", "echo")
        library = "/usr/lib/%s-linux-gnu/libprotobuf-nanopb.a" % platform.machine()
        run(["musl-gcc", "-Os", "-static", "-fno-asynchronous-unwind-tables", "-ffunction-sections",
             "-fdata-sections", "-DCRPC_ENABLE_ZOOKEEPER=0", "-DCRPC_ENABLE_CLIENT=0",
             "-DCRPC_ENABLE_RESOLVER=0", "-DCRPC_ENABLE_SERVERLESS=0", "-I" + ROOT,
             "-I" + self.include, "-I" + generated,
             os.path.join(ROOT, "examples", "echo", "echo_server.c")] +
            sorted(glob.glob(os.path.join(generated, "*.c"))) +
            [library, "-o", output, "-s", "-Wl,--gc-sections", "-Wl,-z,noseparate-code",
             "-Wl,-Map=" + output + ".map"])
        parts = {}
        with open(output + ".map") as f:
            for size, source in re.findall(
                    r"^ \.(?:text|rodata|data|eh_frame)\S*\s+0x[0-9a-f]{16}\s+0x([0-9a-f]+) (\S+)$",
                    f.read().split("memory map")[1], re.M):
                who = ("nanopb" if "libprotobuf-nanopb" in source else
                       "musl: " + re.sub(r".*\((.*)\.lo\)", r"\1", source) if "libc.a(" in source
                       else "crpc and the example")
                parts[who] = parts.get(who, 0) + int(size, 16)
        ranked = sorted(parts.items(), key=lambda p: -p[1])
        self.largest[name] = ["%6d %s" % (size, who) for who, size in ranked[:SHOWN]]
        libc = sum(size for who, size in ranked if who.startswith("musl: "))
        self.splits[name] = "crpc %d, nanopb %d, musl %d" % (
            parts.get("crpc and the example", 0), parts.get("nanopb", 0), libc)
        return {name: os.path.getsize(output), **self.idle(output, "server musl")}

    def idle(self, program, name):
        """Pages of a server that waits for its first connection: the least of a few runs."""
        figures = {}
        for _ in range(12):
            with tempfile.TemporaryDirectory() as directory:
                server = subprocess.Popen([program, "unix://%s/s" % directory],
                                          stdout=subprocess.PIPE)
                server.stdout.readline()
                try:
                    with open("/proc/%d/smaps_rollup" % server.pid) as f:
                        found = dict(re.findall(r"^(\w+):\s+(\d+) kB", f.read(), re.M))
                finally:
                    server.send_signal(signal.SIGTERM)
                    server.wait()
                    server.stdout.close()
            for key, word in [("Rss", "RSS"), ("Anonymous", "anonymous")]:
                figure = "%s: idle %s" % (name, word)
                figures[figure] = min(int(found[key]) * KIB, figures.get(figure, 1 << 60))
        return figures

    def memory(self):
        """What bench/footprint.c prints; the figures are those with the allocator's overhead."""
        figures = {}
        with tempfile.TemporaryDirectory() as directory:
            printed = run([os.path.join(self.build, "bench", "footprint"), directory])
        for name, asked, taken in re.findall(r"^(.*) ([\d.]+) ([\d.]+)$", printed, re.M):
            figures["memory: " + name] = float(taken)
            self.splits["memory: " + name] = "%s asked for" % asked
        return figures


def build():
    """The compilers that the figures come from."""
    versions = {}
    for target, (compiler, _, _) in TARGETS.items():
        versions[target] = "%s %s" % (compiler, run([compiler, "-dumpfullversion"]).strip())
    versions["machine"] = platform.machine()
    return versions


def slack(name):
    return next((size for word, size in SLACK.items() if word in name), 0)


def judge(name, value, before):
    """What is wrong with a figure, or ""."""
    ceiling = CEILINGS.get(name)
    if ceiling and value > ceiling:
        return "over the ceiling of %d by %d" % (ceiling, value - ceiling)
    if before and value > before * (1 + LIMIT / 100) + slack(name):
        return "grown by more than %g %%" % LIMIT
    return ""


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--update", action="store_true", help="rewrite the baseline")
    arguments.add_argument("--build", default="build")
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("words", nargs="*")
    options = arguments.parse_args()

    footprint = Footprint(options.build)
    server = os.path.join(footprint.build, "examples", "echo_server")
    work = [(footprint.code, t, f) for t in TARGETS for f in FEATURES] + [
        (footprint.code, "armv7", f) for f in ARM_FEATURES] + [
        (footprint.toggle, t) for t in TOGGLES] + [
        (footprint.nanopb,), (footprint.musl,), (footprint.idle, server, "server"),
        (footprint.memory,)]
    figures = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(*w) for w in work]:
            figures.update(done.result())
    figures = {name: value for name, value in figures.items()
               if all(word in name for word in options.words)}

    now = build()
    if options.update:
        with open(BASELINE, "w") as f:
            json.dump({"build": now, "bytes": figures}, f, indent=2)
            f.write("\n")
        print("written: %s" % os.path.relpath(BASELINE))
    try:
        with open(BASELINE) as f:
            baseline = json.load(f)
    except FileNotFoundError:
        sys.exit("footprint.py: no baseline; --update makes one")
    compared = baseline["build"] == now
    if not compared:
        print("skipped: growth, for the baseline is of %s" % ", ".join(baseline["build"].values()))

    print("%-44s %10s %10s %9s %9s" % ("bytes", "now", "ceiling", "baseline", "change"))
    wrong = []
    for name, value in figures.items():
        before = baseline["bytes"].get(name) if compared else None
        fault = judge(name, value, before)
        if fault:
            wrong.append((name, fault))
        print("%-44s %10g %10s %9s %9s  %s%s" % (
            name, value, CEILINGS.get(name, ""), "%g" % before if before else "",
            "%+.1f %%" % (100 * (value / before - 1)) if before else "",
            footprint.splits.get(name, ""), "   FAIL: " + fault if fault else ""))
    for name, fault in wrong:
        print("\nFAIL %s: %s" % (name, fault))
        for line in footprint.largest.get(name, []):
            print("  " + line)
    if footprint.columns and not options.words:
        footprint.tables()
    print("\n%d passed, %d failed" % (len(figures) - len(wrong), len(wrong)))
    return 1 if wrong or not figures else 0


if __name__ == "__main__":
    sys.exit(main())
