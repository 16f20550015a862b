#!/usr/bin/python3
"""Measures what crpc takes of a board: code for three processors, a static server, memory. `make
size` calls it; by hand:

    bench/footprint.py [--update] [--build DIR] [--jobs N] [WORD...]

WORD: only figures whose name holds all the words. BUILD/bench/footprint and BUILD/examples/echo_server
have to be there.

code      `size`'s text (code and constants) of an object that holds nothing but crpc, at -Os and
          without tables for unwinding. What of it a program does not use, --gc-sections removes.
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

# Bytes. Without HTTP, which does not exist yet. Everything was to fit 64 KiB of armv7 when it was calls,
# servers and the registry; what has come since is bounded by the baseline.
CEILINGS = {
    "code armv7: client": 24 * KIB,
    "code armv7: client and server": 40 * KIB,
    "server musl: file": 128 * KIB,
    "server musl: idle RSS": 400 * KIB,
    "server: idle RSS": 1536 * KIB,
    "server: idle anonymous": 250 * KIB,
    "memory: a connection": 512,
    "memory: a connection that was used": 512,
}
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
        self.largest = {}       # figure: the functions behind it
        self.splits = {}        # figure: what it consists of

    def code(self, target, features):
        """{figure: bytes} of one object."""
        compiler, flags, prefix = TARGETS[target]
        name = "code %s: %s" % (target, features)
        output = os.path.join(self.dir, "%s-%s.o" % (target, features.replace(" ", "-")))
        run([compiler] + OS_FLAGS + flags + FEATURES[features] +
            ["-I" + ROOT, "-I" + self.include, "-c", self.source, "-o", output])
        text, data, bss = run([prefix + "size", output]).splitlines()[1].split()[:3]
        self.splits[name] = "data %s, bss %s" % (data, bss)
        symbols = run([prefix + "nm", "--size-sort", "--reverse-sort", "-S", output])
        self.largest[name] = ["%6d %s" % (int(size, 16), symbol) for _, size, _, symbol in
                              (line.split() for line in symbols.splitlines())][:SHOWN]
        return {name: int(text)}

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
    print("\n%d passed, %d failed" % (len(figures) - len(wrong), len(wrong)))
    return 1 if wrong or not figures else 0


if __name__ == "__main__":
    sys.exit(main())
