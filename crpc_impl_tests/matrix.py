#!/usr/bin/python3
"""Compiles, links and runs the files of compile/ in every combination that crpc promises:
compilers, language standards, ways to include it, toggles. `make matrix` calls it; by hand:

    crpc_impl_tests/matrix.py [--jobs N] [--build DIR] [WORD...]

WORD: only checks whose name holds all the words. Prints what fails and `N passed, N failed`.
"""
import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
HEADER = os.path.join(ROOT, "crpc.h")

# Everything a careful user may switch on, as errors.
WARNINGS = ("-Wall -Wextra -Wpedantic -Werror -Wconversion -Wsign-conversion -Wshadow -Wundef "
            "-Wcast-qual -Wcast-align -Wformat=2 -Wvla -Wdouble-promotion -Wwrite-strings").split()
C_WARNINGS = "-Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition".split()
CLANG_WARNINGS = ["-Wreserved-identifier"]

C_STANDARDS = ["c99", "c11", "c17"]
CXX_STANDARDS = ["c++17"]
MORE_C = ["gnu99", "gnu11", "gnu17"]            # with the default toggles only
MORE_CXX = ["c++11", "c++14", "c++20", "gnu++17"]
COMPILERS = {"gcc": "g++", "clang": "clang++"}

# How a file gets crpc. late.c cannot ask for _GNU_SOURCE any more: the user has to.
FORMS = {"decl": [], "impl": [], "static": [], "late": ["-D_GNU_SOURCE"]}

ST = ["-DCRPC_ZOOKEEPER_ST=1"]

# What the header refuses, and a word of the #error.
REFUSED = [
    ("system-header-first", "sysfirst", [], "_GNU_SOURCE"),
    ("mt-without-threads", "impl", ["-DCRPC_ENABLE_THREADS=0"], "CRPC_ZOOKEEPER_ST"),
    ("realloc-without-free", "impl", ["-DCRPC_REALLOC=realloc"], "together"),
    ("free-without-realloc", "impl", ["-DCRPC_FREE=free"], "together"),
    ("nanopb-buffer-only", "impl", ["-DPB_BUFFER_ONLY"], "nanopb"),
    ("nanopb-without-64bit", "impl", ["-DPB_WITHOUT_64BIT"], "nanopb"),
    ("nanopb-no-errmsg", "impl", ["-DPB_NO_ERRMSG"], "nanopb"),
]

# What an object without texts may still say: nanopb's words, and the compiler's name.
SPOKEN = {"io error"}

SYSTEM_HEADERS = """arpa/inet.h assert.h errno.h fcntl.h inttypes.h limits.h math.h net/if.h netdb.h
    netinet/in.h netinet/tcp.h poll.h pthread.h semaphore.h signal.h stdarg.h stdbool.h stddef.h
    stdint.h stdio.h stdlib.h string.h sys/epoll.h sys/eventfd.h sys/select.h sys/socket.h
    sys/stat.h sys/time.h sys/types.h sys/uio.h sys/un.h sys/wait.h time.h unistd.h
    pb.h pb_encode.h pb_decode.h zookeeper/zookeeper.h""".split()


def toggles():
    """[(name, default)] of the CRPC_ENABLE_ macros, as crpc.h defines them."""
    with open(HEADER) as f:
        found = re.findall(r"^#ifndef (CRPC_ENABLE_\w+)\n#define \1 ([01])", f.read(), re.M)
    return [(name, int(value)) for name, value in found]


def configurations():
    """{name: flags}: the defaults, each toggle the other way, all off, the other driver."""
    configs = {"default": ["-DTHREADED"], "st": ST}
    for name, value in toggles():
        short = name.replace("CRPC_ENABLE_", "").lower()
        flags = ["-D%s=%d" % (name, 1 - value)]
        if name == "CRPC_ENABLE_THREADS":
            flags += ST                 # libzookeeper_mt cannot do without threads
        elif name != "CRPC_ENABLE_ZOOKEEPER":
            flags += ["-DTHREADED"]
        configs[("no-" if value else "with-") + short] = flags
    configs["bare"] = ["-D%s=0" % name for name, _ in toggles()]
    # The least that can call and serve.
    configs["small"] = ["-D%s=0" % name for name, _ in toggles()
                        if name not in ("CRPC_ENABLE_CLIENT", "CRPC_ENABLE_SERVER")]
    return configs


class Matrix:
    def __init__(self, build):
        self.build = build
        self.configs = configurations()
        self.checks = []        # (name, function); a function returns what is wrong, or ""
        self.objects = {}       # configuration: (path, what went wrong), for checks that share it
        self.objects_lock = threading.Lock()
        self.sizes = {}         # configuration: bytes of code and constants

    def add(self, name, function):
        self.checks.append((name, function))

    @staticmethod
    def run(command, timeout=120):
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  stdin=subprocess.DEVNULL, timeout=timeout, errors="replace")
        except subprocess.TimeoutExpired:
            return -1, "timed out: " + " ".join(command)
        return done.returncode, done.stdout

    def must_run(self, command):
        status, output = self.run(command)
        return "" if status == 0 else "%s\n%s(status %d)" % (" ".join(command), output, status)

    def object(self, name):
        path = os.path.join(self.build, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def command(self, cc, std, source, flags, output, strict=True):
        """The command that compiles compile/SOURCE.c (or a path) with any of the compilers."""
        cxx = std.startswith(("c++", "gnu++"))
        command = [COMPILERS[cc] if cxx else cc, "-x", "c++" if cxx else "c", "-std=" + std]
        if strict:
            command += WARNINGS + ([] if cxx else C_WARNINGS)
            command += CLANG_WARNINGS if cc == "clang" else []
        if os.sep not in source:
            source = os.path.join(HERE, "compile", source + ".c")
        return command + ["-I" + ROOT] + flags + ["-c", source, "-o", output]

    # --- compiling -------------------------------------------------------------------------

    def compile(self, cc, std, form, config, flags):
        name = "compile/%s/%s/%s/%s" % (config, form, std, cc)
        output = self.object(name + ".o")
        return name, lambda: self.must_run(
            self.command(cc, std, form, FORMS[form] + flags, output))

    def add_compiles(self):
        for cc in COMPILERS:
            for form in FORMS:
                for config, flags in self.configs.items():
                    for std in C_STANDARDS + CXX_STANDARDS:
                        self.add(*self.compile(cc, std, form, config, ["-O0"] + flags))
                for std in MORE_C + MORE_CXX:
                    self.add(*self.compile(cc, std, form, "default",
                                           ["-O0"] + self.configs["default"]))
            # Some warnings come only with the optimiser.
            for std in ["c99", "c++17"]:
                for config in ["default", "st", "bare", "small"]:
                    name, function = self.compile(cc, std, "impl", config,
                                                  ["-O2"] + self.configs[config])
                    self.add(name + "-O2", function)

    def add_refusals(self):
        for name, source, flags, word in REFUSED:
            def check(source=source, flags=flags, word=word, name=name):
                command = self.command("gcc", "c99", source, flags + (
                    [] if "-DCRPC_ENABLE_THREADS=0" in flags else ["-DTHREADED"]),
                    self.object("refused/%s.o" % name), strict=False)
                status, output = self.run(command)
                errors = [line for line in output.splitlines() if "#error" in line]
                if status == 0:
                    return "compiles: " + " ".join(command)
                if not any(word in line for line in errors):
                    return "fails without an #error that says '%s':\n%s" % (word, output)
                return ""
            self.add("refused/" + name, check)
        self.add("accepted/system-header-first-with-_GNU_SOURCE", lambda: self.must_run(
            self.command("gcc", "c99", "sysfirst", ["-D_GNU_SOURCE", "-DTHREADED"],
                         self.object("refused/sysfirst-gnu.o"))))

    def add_header_order(self):
        """crpc.h before and after every header that a program may need."""
        def write(name, lines):
            path = self.object("order/%s.c" % name)
            with open(path, "w") as f:
                f.write("".join(line + "\n" for line in lines))
            return os.path.abspath(path)

        def add(name, lines, flags):
            path = write(name, lines)
            for std in ["c99", "c++17"]:
                self.add("order/%s/%s" % (name, std), lambda std=std: self.must_run(
                    self.command("gcc", std, path, flags + ["-DTHREADED"],
                                 path[:-2] + "." + std + ".o")))

        crpc = '#include "crpc.h"'
        for header in SYSTEM_HEADERS:
            short = re.sub(r"\W", "_", header)
            # nothing of it in use: just both orders
            add("before_" + short, [crpc, "#include <%s>" % header], ["-D_GNU_SOURCE"])
            add("after_" + short, ["#include <%s>" % header, crpc], ["-D_GNU_SOURCE"])
        implementation = ["#define CRPC_IMPLEMENTATION", crpc]
        everything = ["#include <%s>" % h for h in SYSTEM_HEADERS]
        add("implementation_before_all", implementation + everything, [])
        add("implementation_after_all", everything + implementation, ["-D_GNU_SOURCE"])

    # --- objects -----------------------------------------------------------------------------

    def built(self, config):
        """The gcc -Os object of a configuration: (path, what went wrong)."""
        with self.objects_lock:
            if config not in self.objects:
                path = self.object("object/%s.o" % config)
                self.objects[config] = path, self.must_run(self.command(
                    "gcc", "c99", "impl", ["-Os"] + self.configs[config], path, strict=False))
            return self.objects[config]

    def text_size(self, path):
        return int(self.run(["size", path])[1].splitlines()[1].split()[0])

    def sentences(self, path):
        """The texts in an object: what has two words in a row."""
        return [line for line in self.run(["strings", "-n", "8", path])[1].splitlines()
                if re.search(r"[a-z]{3,} [a-z]{2,}", line)]

    def symbols(self, path, option):
        return {line.split()[-1] for line in self.run(["nm", option, path])[1].splitlines() if line}

    def add_objects(self):
        """With a toggle off the object is smaller and does without what it stands for."""
        absent = {"no-epoll": (r"epoll_", ""),
                  "no-zookeeper": (r"zoo|deallocate_", r"crpc_(registry|config|lock|election)_"),
                  "no-threads": (r"pthread_", ""), "bare": (r"zoo|deallocate_|epoll_|pthread_", ""),
                  "no-server": ("", r"crpc_server_"), "no-client": ("", r"crpc_channel_"),
                  "no-policy": ("", r"crpci_(guard|order|quota|limiter|breaker|cluster)_")}

        def check(config, than):
            path, wrong = self.built(config)
            other, wrong_other = self.built(than)
            if wrong or wrong_other:
                return wrong or wrong_other
            size, limit = self.text_size(path), self.text_size(other)
            self.sizes.update({config: size, than: limit})
            smaller = not config.startswith("with-")
            if (size >= limit) if smaller else (size <= limit):
                return "text is %d bytes, that of %s %d" % (size, than, limit)
            undefined, defined = absent.get(config, ("", ""))
            bad = [s for s in self.symbols(path, "-u") if undefined and re.match(undefined, s)]
            bad += [s for s in self.symbols(path, "--defined-only")
                    if defined and re.match(defined, s)]
            if "-DCRPC_ENABLE_TEXTS=0" in self.configs[config]:
                bad += [s for s in self.sentences(path) if s not in SPOKEN]
            return "still has " + " ".join(sorted(bad)) if bad else ""

        for config in self.configs:
            if config not in ("default", "st"):
                than = "st" if config == "no-threads" else "default"
                self.add("object/" + config, lambda c=config, t=than: check(c, t))

        def complete():
            path, wrong = self.built("default")
            if wrong:
                return wrong
            with open(HEADER) as f:
                text = re.sub(r"/\*.*?\*/", "", f.read(), flags=re.S)
            text = text.split("CRPC_IMPLEMENTATION_INCLUDED")[0]
            declared = set(re.findall(r"^CRPC_API\b[^;{]*?\b(crpc_\w+)\(", text, re.M))
            missing = declared - self.symbols(path, "--defined-only")
            if not declared:
                return "no CRPC_API declaration was found"
            return "declared but not defined: " + " ".join(sorted(missing)) if missing else ""
        self.add("object/all-declared-functions-are-defined", complete)

    # --- programs ----------------------------------------------------------------------------

    def program(self, name, parts, libs, run=True):
        """parts: [(cc, std, source, flags)]. Links them with the last one's compiler and runs it."""
        def check():
            objects = []
            for cc, std, source, flags in parts:
                objects.append(self.object("program/%s/%s.o" % (name, source)))
                wrong = self.must_run(self.command(cc, std, source, ["-O1", "-g"] + flags,
                                                   objects[-1], strict=False))
                if wrong:
                    return wrong
            cc, std = parts[-1][:2]
            output = self.object("program/%s/program" % name)
            linker = COMPILERS[cc] if std.startswith("c++") else cc
            wrong = self.must_run([linker] + objects + ["-o", output] + libs)
            return wrong or self.must_run([os.path.abspath(output)])
        self.add("program/" + name, check)

    def add_programs(self):
        nanopb = ["-lprotobuf-nanopb", "-lpthread"]
        mt, st = ["-lzookeeper_mt"], ["-l:libzookeeper_st.so.2"]
        default = self.configs["default"]
        hand = ("gcc", "c99", "hand", [])
        for cc in COMPILERS:
            self.program("two-files-%s" % cc, [
                (cc, "c99", "impl", default), (cc, "c99", "user", default)], nanopb + mt)
            self.program("cxx-user-of-c-%s" % cc, [
                (cc, "c99", "impl", default), (cc, "c++17", "user", default)], nanopb + mt)
            self.program("c-user-of-cxx-%s" % cc, [
                (cc, "c++17", "impl", default), (cc, "c99", "user", default)], nanopb + mt)
            for std in ["c99", "c++17"]:
                self.program("copies-%s-%s" % (cc, std), [hand] + [
                    (cc, std, source, default)
                    for source in ["copy_static_a", "copy_static_b", "copy_normal", "copies"]],
                    nanopb + mt)
        for config, libs in [("default", mt), ("st", st), ("no-zookeeper", []), ("no-epoll", mt)]:
            self.program("single-" + config, [hand, ("gcc", "c99", "single", self.configs[config])],
                         nanopb + libs)
        # Calls and failover, whatever is left out.
        for config, libs in [("default", mt), ("no-policy", mt), ("no-texts", mt), ("small", [])]:
            self.program("toggles-" + config,
                         [hand, ("gcc", "c99", "toggles", self.configs[config])], nanopb + libs)
        # Toggles are per file: one that only calls need not know them.
        self.program("toggles-differ", [
            ("gcc", "c99", "impl", self.configs["no-zookeeper"]), ("gcc", "c99", "user", [])], nanopb)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments.add_argument("--build", default="build/matrix")
    arguments.add_argument("words", nargs="*")
    options = arguments.parse_args()

    matrix = Matrix(options.build)
    matrix.add_compiles()
    matrix.add_refusals()
    matrix.add_header_order()
    matrix.add_objects()
    matrix.add_programs()
    checks = [c for c in matrix.checks if all(word in c[0] for word in options.words)]

    groups, failures = {}, []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for (name, _), wrong in zip(checks, pool.map(lambda c: c[1](), checks)):
            group = groups.setdefault(name.split("/")[0], [0, 0])
            group[1 if wrong else 0] += 1
            if wrong:
                failures.append(name)
                print("FAIL %s" % name)
                for line in wrong.splitlines()[:12]:
                    print("     | " + line[:300])
                sys.stdout.flush()
    print("configurations: " + " ".join(matrix.configs))
    if matrix.sizes:
        print("text at -Os: " + ", ".join("%s %d" % s for s in matrix.sizes.items()))
    for group, (passed, failed) in groups.items():
        print("%-10s %4d passed, %d failed" % (group + ":", passed, failed))
    passed = len(checks) - len(failures)
    if not checks:
        failures.append("no check")
    print("\n%d passed, %d failed" % (passed, len(failures)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
