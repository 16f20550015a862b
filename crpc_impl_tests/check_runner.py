#!/usr/bin/python3
"""run_tests.py sees every way in which a test can go wrong: stand-in programs, one or two each.
Prints `N passed, N failed`."""
import os
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))


def cmocka(names, failed=(), errors=0):
    """What a cmocka program prints."""
    text = "[==========] Running %d test(s).\\n" % len(names)
    text += "".join("[ RUN      ] %s\\n[       OK ] %s\\n" % (n, n) for n in names)
    text += "[==========] %d test(s) run.\\n" % len(names)
    text += "[  PASSED  ] %d test(s).\\n" % (len(names) - len(failed) - errors)
    if failed:
        text += "[  FAILED  ] %d test(s), listed below:\\n" % len(failed)
    return "printf '%s'\n" % text


def matrix(cells):
    return "".join("echo MATRIX poller=%s driver=%s scenario=%s\n" % c for c in cells)


GOOD = cmocka(["a", "b"])
ASKED = 'p=$CRPC_TEST_POLLER\necho "MATRIX poller=$p driver=%s scenario=call"\n' + cmocka(["a"])

# A program of the tests in $tests that knows CRPC_TEST_AFTER, and in which one of them hangs.
HANGS = r'''tests="a b c d"
echo CRPC_TEST_SEED=1
[ -z "$CRPC_TEST_AFTER" ] || tests=${tests#*$CRPC_TEST_AFTER}
set -- $tests
echo "[==========] Running $# test(s)."
for t; do
    echo "[ RUN      ] $t"
    case $t in %s) kill -ALRM $$;; esac
    echo "[       OK ] $t"
done
echo "[==========] $# test(s) run."
echo "[  PASSED  ] $# test(s)."
'''

# (what, {program: shell text}, options, passed, failed, pattern of the output)
CASES = [
    ("two good programs", {"one": GOOD, "two": GOOD}, [], 4, 0, ""),
    ("a failed test", {"one": cmocka(["a", "b"], failed=["b"]) + "exit 1"}, [], 1, 1, "FAIL .* one"),
    ("a failed tear-down, which cmocka does not list", {"one": cmocka(["a", "b"], errors=1) + "exit 1"},
     [], 1, 1, ""),
    ("a crash on the way", {"one": "printf '[==========] Running 3 test(s).\n[       OK ] a\n'\n"
     "kill -SEGV $$"}, [], 1, 2, "SIGSEGV"),
    ("a crash after all tests", {"one": GOOD + "kill -ABRT $$"}, [], 2, 1, "SIGABRT"),
    ("a bad exit status alone, as of a leak", {"one": GOOD + "exit 23"}, [], 2, 1, "exit status 23"),
    ("a test that hangs: it alone is counted, and named", {"one": HANGS % "b"}, [], 3, 1,
     "killed by SIGALRM in b$"),
    ("a test that hangs with its program's time limit", {"one": HANGS.replace("kill -ALRM $$",
     "sleep 30") % "b"}, ["--timeout=1"], 3, 1, "timed out after 1 s in b$"),
    ("the last test hangs", {"one": HANGS % "d"}, [], 3, 1, "killed by SIGALRM in d$"),
    ("a test ends its program with a status", {"one": HANGS.replace("kill -ALRM $$", "exit 1") % "a"},
     [], 3, 1, "exit status 1 in a$"),
    ("every test hangs: restarts are bounded", {"one": HANGS.replace("c d", "c d e f") %
     "*"}, [], 0, 6, "in a, killed by SIGALRM in b, .* in c, killed by SIGALRM in d$"),
    ("a test that hangs in a program that cannot begin behind it", {"one": HANGS.replace(
        "CRPC_TEST_SEED=", "") % "b"}, [], 1, 3, "killed by SIGALRM in b$"),
    ("a time-out", {"one": "sleep 30"}, ["--timeout=1"], 0, 1, "timed out"),
    ("no test in a program", {"one": "exit 0"}, [], 0, 1, "no test was run"),
    ("a program that is not there", {"one": GOOD, "gone": None}, [], 2, 1, "not run"),
    ("no program", {}, [], 0, 1, "no test was run"),
    ("a build that failed", {"one": GOOD}, ["--build-failed"], 2, 1, "could be built"),
    ("a script", {"a.sh": "echo 5 passed, 0 failed"}, [], 5, 0, ""),
    ("a script's failures", {"a.sh": "echo 5 passed, 2 failed; exit 1"}, [], 5, 2, ""),
    ("a script without counts", {"a.sh": "exit 0"}, [], 0, 1, "no test was run"),
    ("a script that counts none failed and exits with 1", {"a.sh": "echo 5 passed, 0 failed; exit 1"},
     [], 5, 1, ""),
    ("skipped tests in CI", {"one": "printf '[==========] Running 1 test(s).\\n[  PASSED  ] 0 "
     "test(s).\\n[  SKIPPED ] 1 test(s), listed below:\\n'"}, [], 0, 1, "1 skipped"),
    ("skipped tests of a script in CI", {"a.sh": "echo skipped: x; echo 5 passed, 0 failed"}, [], 5, 1,
     "1 skipped"),
    ("all four cells", {"sys.mt": ASKED % "mt", "sys.st": ASKED % "st"}, [], 4, 0, "4 cells, 0 wrong"),
    ("a missing driver", {"sys.mt": ASKED % "mt"}, [], 2, 2, "no passing run on poll/st"),
    ("another poller than asked for", {
        "sys.mt": matrix([("epoll", "mt", "call")]) + GOOD, "sys.st": ASKED % "st"}, [], 6, 2,
     "sys poll/mt: scenario call ran on epoll/mt"),
    ("a cell of a failed run", {"sys.mt": ASKED % "mt" + "exit 1", "sys.st": ASKED % "st"}, [], 4, 4,
     "MISSING"),
    ("a mutant that is caught", {"one": GOOD, "mutant/M/one": "exit 66"}, [], 3, 0, "caught"),
    ("a mutant that hangs", {"one": GOOD, "mutant/M/one": "sleep 30"}, ["--mutant-timeout=1"], 3, 0,
     "timed out"),
    ("a mutant that one of two programs catches", {"mutant/M/one": GOOD, "mutant/M/two": "exit 1"}, [],
     1, 0, "caught"),
    ("a mutant that passes", {"one": GOOD, "mutant/M/one": GOOD}, [], 2, 1, "mutant M: no test fails"),
    ("a mutant without a program", {"one": GOOD, "mutant/M/none": None}, [], 2, 1, "mutant M"),
    ("the same behind a prefix", {"mutant/M/none": None}, ["--prefix=env A=B"], 0, 1, "mutant M"),
]


def main():
    passed = failed = 0
    for what, programs, options, good, bad, pattern in CASES:
        with tempfile.TemporaryDirectory() as directory:
            paths = []
            for name, text in programs.items():
                paths.append(os.path.join(directory, name))
                os.makedirs(os.path.dirname(paths[-1]), exist_ok=True)
                if text is not None:
                    with open(paths[-1], "w") as f:
                        f.write("#!/bin/bash\n" + text + "\n")
                    os.chmod(paths[-1], 0o755)
            done = subprocess.run(
                [os.path.join(HERE, "run_tests.py"), "--log", os.path.join(directory, "log")] +
                options + paths, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=dict(os.environ, CI="true", CRPC_TEST_FILTER=""), stdin=subprocess.DEVNULL)
            last = done.stdout.splitlines()[-1]
            if last == "%d passed, %d failed" % (good, bad) and \
                    done.returncode == (1 if bad else 0) and re.search(pattern, done.stdout, re.M):
                passed += 1
            else:
                failed += 1
                print("FAIL %s: expected %d passed, %d failed and '%s'; status %d:\n%s" % (
                    what, good, bad, pattern, done.returncode, done.stdout))
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
