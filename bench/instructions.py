#!/usr/bin/python3
"""Counts the instructions that an echo call of 32 bytes costs the client and the server. `make
instructions` calls it; by hand:

    bench/instructions.py [--update] [--runs N] [--top N] [--jobs N] PROGRAM

PROGRAM is bench/instructions.c compiled with -O2. Each case is run under callgrind with N calls and
with 2N; the difference is what N calls cost, without starting and ending. Nothing in it depends on
the speed or the load of the machine, so that a growth over 3 % against baseline/instructions.json
is a regression, and fails. The system's own part of a call is not in it.

libc is told to use the functions that every x86-64 has, and the environment is always the same, for
both would change the counts. A baseline of another compiler, libc or machine is not compared with.
"""
import argparse
import collections
import concurrent.futures
import json
import os
import platform
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BASELINE = os.path.join(HERE, "baseline", "instructions.json")
LIMIT = 3.0         # per cent
DEPTH = 32          # calls under way at a time, where it says pipelined
NANOPB = "/usr/lib/%s-linux-gnu/libprotobuf-nanopb.a" % platform.machine()

# name: (calls, arguments, the function that is looked into or None)
CASES = {
    "client, synchronous": (1000, ["sync", "SERVER", "N"], None),
    "client, pipelined": (3200, ["both", "URL", "N", str(DEPTH)], "client_turn"),
    "server, one at a time": (1000, ["both", "URL", "N", "1"], "server_turn"),
    "server, pipelined": (3200, ["both", "URL", "N", str(DEPTH)], "server_turn"),
}
# A choice of a provider costs about the same among few and many.
CASES.update({"choice, lb=%s of %d" % (lb, count): (8000, ["pick", lb, str(count), "N"], "pick_turn")
              for lb in ("wrr", "rr", "wrandom", "la", "hash", "p2c") for count in (10, 2000)})
# What a registry's list costs the directory and the channel.
CASES.update({
    "first list of 10000": (2, ["list", "wrr", "10000", "N"], "list_turn"),
    "change of 1 in 10000": (4, ["change", "wrr", "10000", "N"], "list_turn"),
    "same, lb=hash": (2, ["change", "hash", "10000", "N"], "list_turn"),
})

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LC_ALL": "C",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-AVX_Fast_Unaligned_Load,-ERMS",
}


def build():
    """What the counts depend on beside the source."""
    cc = subprocess.run([os.environ.get("CC", "gcc"), "-dumpfullversion"],
                        stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        libc = "unknown"
    return {"machine": platform.machine(), "compiler": "%s %s" % (
        os.path.basename(os.environ.get("CC", "gcc")), cc), "libc": libc, "flags": "-O2"}


def read_profile(path):
    """{(object, function): instructions of its own} of a callgrind file."""
    names = {"ob": {}, "fn": {}}
    now = {"ob": "", "fn": ""}
    costs = collections.Counter()
    of_call = False
    with open(path, errors="replace") as f:
        for line in f:
            found = re.match(r"(ob|fn)=\((\d+)\)(?: (.*))?$", line)
            if found:
                kind, number, name = found.groups()
                if name is not None:
                    names[kind][number] = name
                now[kind] = names[kind][number]
            elif re.match(r"c(ob|fn)=\(\d+\) ", line):   # a name may be given first where it is called
                kind, number, name = re.match(r"c(ob|fn)=\((\d+)\) (.*)$", line).groups()
                names[kind][number] = name
            elif line.startswith("calls="):
                of_call = True      # the next line is what was spent in there
            elif re.match(r"[+\-*\d]\S* \d+$", line):
                if not of_call:
                    costs[(os.path.basename(now["ob"]), now["fn"])] += int(line.split()[1])
                of_call = False
    return costs


def callgrind(program, arguments, function):
    with tempfile.NamedTemporaryFile() as out:
        command = ["valgrind", "-q", "--tool=callgrind", "--callgrind-out-file=" + out.name]
        if function:
            command.append("--toggle-collect=" + function)
        done = subprocess.run(command + [program] + arguments, env=ENVIRONMENT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        if done.returncode:
            sys.exit("instructions.py: %s\n%s" % (" ".join(command + [program] + arguments),
                                                  done.stdout))
        return read_profile(out.name)


def measure(program, name):
    """{(object, function): instructions per call}."""
    calls, arguments, function = CASES[name]
    profiles = []
    with tempfile.TemporaryDirectory() as directory:
        url = "unix://%s/both" % directory
        server = None
        if "SERVER" in arguments:
            server = subprocess.Popen([program, "serve", "unix://%s/s" % directory],
                                      stdout=subprocess.PIPE)
            server.stdout.readline()
        try:
            for n in (calls, 2 * calls):
                words = {"N": str(n), "URL": url, "SERVER": "unix://%s/s" % directory}
                profiles.append(callgrind(program, [words.get(a, a) for a in arguments], function))
        finally:
            if server:
                server.terminate()
                server.wait()
                server.stdout.close()
    once, twice = profiles
    return {key: (twice[key] - once[key]) / calls for key in twice if twice[key] != once[key]}


def plain(name):
    """A function's name without what the compiler and the linker add."""
    return re.sub(r"(\.(part|constprop|isra|cold)(\.\d+)?|@@?\w+[.\d]*|'\d+)+$", "", name)


def owner(key, nanopb):
    image, function = key
    if plain(function) in nanopb:
        return "nanopb"
    if re.match(r"crpci?_", function):
        return "crpc"
    return "libc" if re.match(r"libc[.-]|ld-linux", image) else "program"


def nanopb_functions():
    done = subprocess.run(["nm", NANOPB], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True)
    return {line.split()[2] for line in done.stdout.splitlines()
            if len(line.split()) == 3 and line.split()[1] in "tTW"}


def show(name, profile, top, nanopb):
    total = sum(profile.values())
    shares = collections.Counter()
    functions = collections.Counter()
    for key, cost in profile.items():
        shares[owner(key, nanopb)] += cost
        functions[(owner(key, nanopb), plain(key[1]))] += cost
    print("\n%s: %.0f instructions per call; %s" % (name, total, ", ".join(
        "%s %.0f" % share for share in shares.most_common())))
    for (who, function), cost in functions.most_common(top):
        print("  %7.1f %5.1f %%  %-7s %s" % (cost, 100 * cost / total, who, function))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--update", action="store_true", help="rewrite the baseline")
    arguments.add_argument("--runs", type=int, default=1, help="and show how far they differ")
    arguments.add_argument("--top", type=int, default=12, help="functions shown of each case")
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("program")
    options = arguments.parse_args()
    program = os.path.abspath(options.program)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {name: [pool.submit(measure, program, name) for _ in range(options.runs)]
                   for name in CASES}
        profiles = {name: [f.result() for f in futures] for name, futures in running.items()}
    nanopb = nanopb_functions()
    for name in CASES:
        show(name, profiles[name][0], options.top, nanopb)
    print()
    totals = {name: [sum(p.values()) for p in runs] for name, runs in profiles.items()}
    if options.runs > 1:
        for name, values in totals.items():
            print("%-24s %d runs differ by %.3f %%" % (
                name, len(values), 100 * (max(values) - min(values)) / min(values)))
        print()

    present = {name: round(min(values), 1) for name, values in totals.items()}
    if options.update:
        with open(BASELINE, "w") as f:
            json.dump({"build": build(), "instructions_per_call": present}, f, indent=2)
            f.write("\n")
        print("written: %s" % os.path.relpath(BASELINE))
    try:
        with open(BASELINE) as f:
            baseline = json.load(f)
    except FileNotFoundError:
        sys.exit("instructions.py: no baseline; --update makes one")
    compared = baseline["build"] == build()
    if not compared:
        print("skipped: the baseline is of %s, this is %s" % (
            " ".join(baseline["build"].values()), " ".join(build().values())))
    passed = failed = 0
    print("%-24s %12s %12s %9s" % ("instructions per call", "now", "baseline", "change"))
    for name, now in present.items():
        before = baseline["instructions_per_call"].get(name)
        change = 100 * (now / before - 1) if before else 0
        worse = compared and before and change > LIMIT
        passed, failed = passed + (not worse), failed + bool(worse)
        print("%-24s %12.1f %12s %+8.2f %%%s" % (
            name, now, before, change,
            "   FAIL: over %g %%" % LIMIT if worse else
            "   better: UPDATE=1 keeps it" if compared and change < -LIMIT else ""))
    print("\n%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
