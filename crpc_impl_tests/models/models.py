#!/usr/bin/python3
"""Explores models of crpc's protocols with spin, each whole and with one rule left out.

    models.py [--build DIR]

The whole model must hold in every state that it can reach, and all of them must have been visited,
with no statement left that is never reached.
Each model with a rule left out must be found wrong: otherwise the model does not need that rule, or
does not see that it is missing. The last line is "N passed, N failed".
"""
import argparse
import os
import re
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# of each model: the rules that can be left out
MODELS = {"lease": ("NO_WAIT", "NO_HOLD_ALLOWANCE", "NO_WAIT_ALLOWANCE", "NO_CHECK", "FROM_ANSWER",
                    "RENEW_BY_READ", "WITNESS")}
MEMORY_MIB = 4000       # that a search may take; the largest needs 2,500
SECONDS = 600
# Breadth first: the shortest way to a fault is found, and there is no limit of depth to reach.
CFLAGS = ["-O2", "-w", "-DSAFETY", "-DBFS", "-DCOLLAPSE", "-DMEMLIM=%d" % MEMORY_MIB]


def build(model, rule, directory):
    os.makedirs(directory, exist_ok=True)
    subprocess.run(["spin", "-a"] + (["-D" + rule] if rule else []) +
                   [os.path.join(HERE, model + ".pml")], cwd=directory, check=True,
                   stdout=subprocess.DEVNULL)
    subprocess.run([os.environ.get("CC", "gcc"), *CFLAGS, "-o", "pan", "pan.c"], cwd=directory,
                   check=True)


def explore(directory):
    """(states, whether a fault was found, whether every state was visited)"""
    try:
        done = subprocess.run(["./pan"], cwd=directory, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 0, False, False
    said = done.stdout
    with open(os.path.join(directory, "pan.txt"), "w") as out:
        out.write(said)
    states = re.search(r"(\d+) states, stored", said)
    return int(states.group(1)) if states else 0, "assertion violated" in said, was_whole(said)


def was_whole(said):
    """Whether a search found no error, ended by itself and left no statement unreached."""
    return bool(re.search(r"errors: 0\b", said)) and not re.search(
        r'out of memory|too small|Search not completed|state \d+, "(?!-end-)', said)


def check(model, rule, build_directory):
    directory = os.path.join(build_directory, model, rule or "whole")
    began = time.monotonic()
    build(model, rule, directory)
    states, wrong, whole = explore(directory)
    ok = wrong if rule else whole
    print("%-4s  %-8s %-16s %9d states  %5.1f s  %s" % (
        "ok" if ok else "FAIL", model, rule or "whole", states, time.monotonic() - began,
        "" if ok else "found nothing wrong" if rule else "wrong" if wrong else "not explored whole"),
        flush=True)
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build/models", help="where the searches are compiled")
    options = parser.parse_args()
    results = [check(model, rule, options.build)
               for model, rules in MODELS.items() for rule in (None, *rules)]
    print("%d passed, %d failed" % (results.count(True), results.count(False)))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
