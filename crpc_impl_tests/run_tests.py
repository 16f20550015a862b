#!/usr/bin/python3
"""Runs crpc's test programs and adds up their results. `make test` calls it; by hand:

    crpc_impl_tests/run_tests.py [--seed N] [--jobs N] [--log DIR] PROGRAM...

What a program is follows from its path:

    .../NAME.mt, .../NAME.st   a system test (driver mt or st): run once with each poller, by the
                               environment variable CRPC_TEST_POLLER; prints MATRIX lines
    .../mutant/MUTANT/NAME     a build with one rule of crpc left out: has to fail
    NAME.py, NAME.sh           a script that prints `N passed, N failed`, and for each test that
                               cannot run here a line `skipped: ...`
    anything else              a cmocka program

A comment `crpc-test-timeout: SECONDS` in its source changes a program's time limit. A cmocka program
that a test ends, by a crash or by hanging, is started again for the tests behind that one, up to
RESTARTS times: only the test that ended it, which is named, and what did not run count as failed.
"""
import argparse
import concurrent.futures
import glob
import os
import random
import re
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TIMEOUT = 300          # seconds, of one program, and again of each restart
RESTARTS = 3           # of one program
MUTANT_TIMEOUT = 60    # a mutant that hangs is caught as well as one that crashes
SHOWN_LINES = 120      # of a failing program's output; the log has all
CAUSE_LINES = 16       # of it, at the end of the run
POLLERS = ("epoll", "poll")
DRIVERS = ("mt", "st")

SANITIZERS = {
    # handle_*=2: cmocka would take the signal and lose the stack trace
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1:"
                    "handle_segv=2:handle_sigbus=2:handle_sigfpe=2:handle_sigill=2",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "suppressions=%s:second_deadlock_stack=1:print_suppressions=0"
                    % os.path.join(HERE, "tsan.supp"),
}
lsan = os.path.join(HERE, "lsan.supp")
if os.path.exists(lsan):
    SANITIZERS["LSAN_OPTIONS"] = "suppressions=%s:print_suppressions=0" % lsan


CHILDREN = set()        # process groups that are running


def end_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def interrupted(signo, _):
    """Stopped from outside: leaves no test program, and no server of one, behind."""
    for pid in list(CHILDREN):
        end_group(pid)
    os._exit(128 + signo)


class Run:
    """One execution of one program."""

    def __init__(self, path):
        self.path = path
        self.name = os.path.splitext(os.path.basename(path))[0]
        self.poller = self.driver = self.mutant = None
        self.script = path.endswith((".py", ".sh"))
        base, ext = os.path.splitext(path)
        if ext[1:] in DRIVERS:
            self.driver = ext[1:]
        parts = path.split(os.sep)
        if "mutant" in parts[:-1]:
            self.mutant = parts[-2]
        self.passed = self.failed = self.skipped = 0
        self.why = ""
        self.output = ""
        self.shown = ""     # what to show of a failed run: the output of the starts that went wrong
        self.seconds = 0.0

    def label(self):
        if self.driver:
            return "%s %s/%s" % (self.name, self.poller, self.driver)
        if self.mutant:
            return "%s -%s" % (self.name, self.mutant)
        if self.script:     # told apart by their directory: plugin/run
            return os.path.splitext(os.path.relpath(self.path, HERE))[0].replace("../", "")
        return self.name

    def timeout(self):
        for source in [self.path] if self.script else glob.glob(
                os.path.join(HERE, "**", self.name + ".c"), recursive=True):
            with open(source, errors="replace") as f:
                found = re.search(r"crpc-test-timeout:\s*(\d+)", f.read(4096))
            if found:
                return int(found.group(1))
        return TIMEOUT


def execute(run, options):
    env = dict(os.environ, CRPC_TEST_SEED=str(options.seed), BUILD=os.path.abspath(options.build))
    for key, value in SANITIZERS.items():
        env[key] = value + (":" + os.environ[key] if key in os.environ else "")
    limit = options.timeout or run.timeout()
    if run.poller:
        env["CRPC_TEST_POLLER"] = run.poller
    if run.mutant:
        limit = options.mutant_timeout
        env["CRPC_TEST_MUTANT"] = run.mutant
        env["TSAN_OPTIONS"] += ":halt_on_error=1"
    command = [os.path.abspath(run.path)]
    if run.path.endswith(".py"):
        command.insert(0, "/usr/bin/python3")
    elif run.path.endswith(".sh"):
        command.insert(0, "bash")
    command = options.prefix + command

    run.log = os.path.join(options.log, run.label().replace("/", "-").replace(" ", "_") + ".log")
    if os.path.exists(run.log):
        os.remove(run.log)
    begin = time.monotonic()
    filtered = bool(os.environ.get("CRPC_TEST_FILTER"))
    for restarts_left in range(0 if run.script or run.mutant else RESTARTS, -1, -1):
        why, output = start(run, command, env, limit)
        failed, left, last = count(run, output, filtered)
        # the seed is printed by the programs that know CRPC_TEST_AFTER
        again = restarts_left and last and left and "CRPC_TEST_SEED=" in output
        if not again and not filtered:
            failed += left
        if why.startswith("exit status") and failed and not last:
            why = ""            # as is the rule when a test failed
        if why and not failed:  # all tests passed, but a leak was found, for instance
            failed = 1
        if not why and run.passed + run.failed + failed + run.skipped == 0 and not filtered:
            why, failed = "no test was run", 1
        run.output += output
        run.failed += failed
        if failed:
            run.shown += output
        if why:
            run.why += (", " if run.why else "") + why + (" in " + last if last else "")
        if not again:
            break
        env["CRPC_TEST_AFTER"] = last
    run.seconds = time.monotonic() - begin
    return run


def start(run, command, env, limit):
    """Runs the command to its end or until `limit` seconds are over; (what went wrong, output)."""
    status, timed_out, why = None, False, ""
    size = os.path.getsize(run.log) if os.path.exists(run.log) else 0
    try:
        # asked here, because a prefix command would turn it into an exit status of its own
        if not os.path.isfile(run.path):
            raise FileNotFoundError(0, "there is no such program")
        with open(run.log, "ab") as out:
            # A process group of its own, so that a time-out also ends what the program started.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out,
                                     stderr=subprocess.STDOUT, env=env, start_new_session=True)
            CHILDREN.add(child.pid)
            try:
                status = child.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                timed_out = True
            end_group(child.pid)
            child.wait()
            CHILDREN.discard(child.pid)
    except OSError as error:
        why = "not run: %s" % error.strerror
    output = ""
    if os.path.exists(run.log):
        with open(run.log, "rb") as f:
            f.seek(size)
            output = f.read().decode(errors="replace")
    if timed_out:
        why = "timed out after %d s" % limit
    elif status and status < 0:
        why = "killed by %s" % signal.Signals(-status).name
    elif status:
        why = "exit status %d" % status
    return why, output


def count(run, output, filtered):
    """Takes the numbers from what one start printed. Returns how many tests failed, how many did
    not run, and the name of the test that ended the program, "" if it came to its end."""
    if run.script:
        found = re.findall(r"^(\d+) passed, (\d+) failed", output, re.M)
        passed, failed = map(int, found[-1]) if found else (0, 0)
        run.passed += passed
        run.skipped += len(re.findall(r"^skipped: ", output, re.M))
        return failed, 0, ""
    begun = sum(map(int, re.findall(r"^\[=+\] Running (\d+) test", output, re.M)))
    if re.search(r"^\[  PASSED  \]", output, re.M):
        # cmocka's list of failures leaves out tests whose set-up or tear-down failed: subtract
        passed = sum(map(int, re.findall(r"^\[  PASSED  \] (\d+) test", output, re.M)))
        skipped = sum(map(int, re.findall(r"^\[  SKIPPED \] (\d+) test", output, re.M)))
        # a test filter leaves the others out of what was run
        done = re.findall(r"^\[=+\] (\d+) test\(s\) run", output, re.M)
        if done and filtered:
            begun = sum(map(int, done))
        failed, left, last = max(0, begun - passed - skipped), 0, ""
    else:
        lines = re.findall(r"^\[ +(RUN|OK|SKIPPED|FAILED|ERROR) +\] (\S+)", output, re.M)
        kinds = [kind for kind, _ in lines]
        passed, skipped = kinds.count("OK"), kinds.count("SKIPPED")
        failed = max(0, kinds.count("RUN") - passed - skipped)
        left = max(0, begun - failed - passed - skipped)
        last = lines[-1][1] if lines and lines[-1][0] == "RUN" else ""
    run.passed += passed
    run.skipped += skipped
    return failed, left, last


def cause(output):
    """What a failing program said of its first fault: a sanitizer's report, or an assertion's line."""
    lines = output.splitlines()
    for i, line in enumerate(lines):
        if re.search(r"WARNING: ThreadSanitizer|ERROR: \w+Sanitizer|runtime error:", line):
            return [x for x in lines[i:i + 3 * CAUSE_LINES] if x.strip()][:CAUSE_LINES]
    return [x for x in lines if re.search(r"^ERROR: |: error: |^FAIL|FAILED:|Error:", x)][:CAUSE_LINES]


def show(run, number, total, caught=False):
    numbers = "%d passed" % run.passed
    if run.failed:
        numbers += ", %d failed" % run.failed
    if run.skipped:
        numbers += ", %d skipped" % run.skipped
    word = "FAIL " if run.failed else "ok   "
    if run.mutant:
        word = "ok   " if caught else "     "
        numbers = "caught" if caught else "not caught"
    print("%s %3d of %d  %-44s %-28s %6.1f s  %s" % (word, number, total, run.label(), numbers,
                                                     run.seconds, run.why), flush=True)
    if run.failed and not run.mutant:
        lines = run.shown.splitlines()
        print("      --- the last lines of %s" % run.log)
        for line in lines[-SHOWN_LINES:]:
            print("      | " + line)
        print("      ---", flush=True)


def check_matrix(runs):
    """Every scenario has to come from each poller with each driver. Returns (cells, faults)."""
    cells, faults = {}, []
    for run in runs:
        for poller, driver, scenario in re.findall(
                r"MATRIX poller=(\S+) driver=(\S+) scenario=(\S+)", run.output):
            if run.driver and (poller, driver) != (run.poller, run.driver):
                faults.append("%s: scenario %s ran on %s/%s" % (run.label(), scenario, poller, driver))
            if not run.failed:
                cells.setdefault(scenario, set()).add((poller, driver))
    if not cells:
        return 0, faults
    columns = [(p, d) for p in POLLERS for d in DRIVERS]
    width = max(len(s) for s in ["scenario", *cells]) + 2
    print("\n%-*s%s" % (width, "scenario", "".join("%-10s" % "/".join(c) for c in columns)))
    for scenario in sorted(cells):
        row = ["passed" if c in cells[scenario] else "MISSING" for c in columns]
        print("%-*s%s" % (width, scenario, "".join("%-10s" % r for r in row)))
        faults += ["scenario %s: no passing run on %s/%s" % (scenario, *c)
                   for c in columns if c not in cells[scenario]]
    return len(cells) * len(columns), faults


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seed", type=int, default=None)
    arguments.add_argument("--jobs", type=int, default=1)
    arguments.add_argument("--build", default="build")
    arguments.add_argument("--log", default="build/log")
    arguments.add_argument("--timeout", type=int, help="seconds, whatever the sources say")
    arguments.add_argument("--mutant-timeout", type=int, default=MUTANT_TIMEOUT)
    arguments.add_argument("--prefix", default="", help="command put before each program")
    arguments.add_argument("--build-failed", action="store_true", help="counts as a failure")
    arguments.add_argument("programs", nargs="*")
    options = arguments.parse_args()
    options.seed = options.seed or random.randrange(1, 1 << 31)
    options.prefix = options.prefix.split()
    os.makedirs(options.log, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGINT, interrupted)

    runs = []
    for path in options.programs:
        if os.path.splitext(path)[1][1:] in DRIVERS:
            for poller in POLLERS:
                runs.append(Run(path))
                runs[-1].poller = poller
        else:
            runs.append(Run(path))
    random.Random(options.seed).shuffle(runs)
    print("SEED=%d repeats this order\n" % options.seed, flush=True)

    plain = [r for r in runs if not r.mutant]
    mutants = sorted({r.mutant for r in runs if r.mutant})
    total = len(plain) + len(mutants)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for number, done in enumerate(concurrent.futures.as_completed(
                [pool.submit(execute, r, options) for r in plain]), 1):
            show(done.result(), number, total)
    passed = sum(r.passed for r in plain)
    failed = sum(r.failed for r in plain)
    skipped = sum(r.skipped for r in plain)
    faults = ["\n      | ".join(["%s: %s" % (r.label(), r.why or "%d failed" % r.failed),
                                *cause(r.output)]) for r in plain if r.failed]

    cells, missing = check_matrix(plain)
    if cells:
        print("%d cells, %d wrong" % (cells, len(missing)))
    failed += len(missing)
    faults += missing

    # A mutant counts as caught as soon as one of the programs that stand for its rule fails.
    for number, mutant in enumerate(mutants, len(plain) + 1):
        for run in (r for r in runs if r.mutant == mutant):
            execute(run, options)
            caught = run.failed > 0 and not run.why.startswith("not run")
            show(run, number, total, caught)
            if caught:
                passed += 1
                break
        else:
            failed += 1
            faults.append("mutant %s: no test fails without the rule" % mutant)

    if options.build_failed:
        failed += 1
        faults.append("not everything could be built (see above)")
    if skipped:
        print("\n%d skipped" % skipped)
        if os.environ.get("CI"):    # a check that does not run is no check
            failed += skipped
            faults.append("%d tests were skipped" % skipped)
    if passed + failed == 0:
        failed = 1
        faults.append("no test was run")
    if faults:
        print("\nfailures:")
        for fault in faults:
            print("  " + fault)
    print("\n%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
