#!/usr/bin/python3
"""Checks the rules that crpc's source follows and no compiler knows. `make lint` calls it; by hand:

    crpc_impl_tests/lint.py [--include DIR]... [CHECK...]     # the checks, by name; all by default
    crpc_impl_tests/lint.py --self-test                       # that each of them can fail

Prints `file:line: what is wrong` and ends with `N passed, N failed`, counting checks. Without
--self-test both are done: first every check is shown to reject a broken sample.

Samples: every fenced `c` block of README.md, and every part of crpc.h's manual between a line that
holds `@example NAME` and one that holds `@end`, is a complete file, valid as C99 and as C++17. It
may include what the .proto files of examples/ give. A fenced `proto` block of README.md that
begins with a comment naming it (`// user.proto`) is generated and included in preference to that.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Tags that are neither api- nor impl-.
OTHER_TAGS = {"config", "platform", "changelog", "license"}
# Further prefixes, less crpci_, of the internal functions of a section: {"zookeeper": ["zk"]}.
ALIASES = {
}
# Test files without a section of their own, and what they are for.
EXTRA_TESTS = {
    "test_api.c": "the public interface as a whole",
    "test_api_macros.c": "every public macro expanded once",
}
MAX_FUNCTION_LINES = 80
LONG_FUNCTIONS = set()      # those that may be longer
MAX_LINES = 27600           # of crpc.h
MAX_CODE_LINES = 20310      # of its implementation, neither blank nor only comment
COMMENT_PERCENT = (10, 13)  # of the implementation's lines, those that are comments
MAX_SECTION_LINES = 940
LONG_SECTIONS = {}          # {tag: why it may be longer}
MAX_COLUMNS = 100
TOP_LEVEL = {"crpc.h", "protoc-gen-crpc", "crpc_impl_tests", "examples", "bench", "Makefile",
             "LICENSE", "README.md"}
# Macros that the implementation leaves behind although they are not crpc's: it has to define them
# before it includes libc's and nanopb's headers.
FOREIGN_MACROS = {"_GNU_SOURCE", "PB_C99_STATIC_ASSERT"}

CHECKS = {}


def check(function):
    CHECKS[function.__name__.replace("_", "-")] = function
    return function


def run(command, **more):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, errors="replace", **more)


def blank_out(text):
    """The text with comments and literals replaced by blanks: same length, same lines."""
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)


class Tree:
    """The repository at `root`, with crpc.h taken apart."""

    def __init__(self, root, build, includes=()):
        self.root, self.build, self.includes = root, build, list(includes)
        os.makedirs(build, exist_ok=True)
        self.text = self.read("crpc.h")
        self.lines = self.text.splitlines()
        self.code = blank_out(self.text)
        self.code_lines = self.code.splitlines()
        self.sections = []      # [tag, line of the tag, line of the next tag], from the banners
        for number, line in enumerate(self.lines, 1):
            found = re.match(r"/\* >>([\w-]+)", line)
            if found:
                if self.sections:
                    self.sections[-1][2] = number
                self.sections.append([found.group(1), number, len(self.lines) + 1])
        self.first_impl = min((s[1] for s in self.sections if s[0].startswith("impl-")),
                              default=len(self.lines) + 1)
        self.tags = self.ctags()

    def read(self, name):
        path = os.path.join(self.root, name)
        if not os.path.exists(path):
            return ""
        with open(path, errors="replace") as f:
            return f.read()

    def files(self):
        """What git knows or would add; in a sample tree all there is."""
        listed = run(["git", "-C", self.root, "ls-files", "-co", "--exclude-standard"])
        if listed.returncode == 0 and os.path.exists(os.path.join(self.root, ".git")):
            names = listed.stdout.splitlines()
        else:
            names = [os.path.relpath(os.path.join(d, f), self.root)
                     for d, _, files in os.walk(self.root) for f in files]
        return sorted(n for n in names if os.path.isfile(os.path.join(self.root, n)))

    def texts(self, suffixes=()):
        for name in self.files():
            if not suffixes or name.endswith(suffixes):
                with open(os.path.join(self.root, name), "rb") as f:
                    raw = f.read()
                if b"\0" not in raw:
                    yield name, raw.decode(errors="replace")

    def ctags(self):
        """[(name, kind, first line, last line)]: functions, prototypes, types, variables."""
        listed = run(["ctags", "--language-force=C", "--kinds-C=fptsugev", "--fields=+ne",
                      "-I", "CRPC_API,CRPC_MUST_CHECK,CRPCI_FN,CRPCI_COLD,CRPCI_WEAK,CRPC_PRINTF+",
                      "--_xformat=%N %K %n %e", "-x", "-o", "-",
                      os.path.join(self.root, "crpc.h")])
        if listed.returncode != 0:
            sys.exit("lint.py: ctags failed: " + listed.stderr)
        tags = []
        for line in listed.stdout.splitlines():
            name, kind, first, *last = line.split()
            tags.append((name, kind, int(first), int(last[0]) if last else int(first)))
        return tags

    def functions(self):
        """The implementation's functions."""
        return [t for t in self.tags if t[1] == "function" and t[2] > self.first_impl]

    def section_of(self, line):
        """(position, tag) of the section that holds a line."""
        for position, (tag, first, end) in enumerate(self.sections):
            if first <= line < end:
                return position, tag
        return -1, ""

    def volume(self):
        """(code, comment, all) lines of the implementation: comment lines hold nothing else."""
        pairs = [(code.strip(), line.strip()) for code, line in
                 zip(self.code_lines[self.first_impl - 1:], self.lines[self.first_impl - 1:])]
        return (sum(1 for code, _ in pairs if code),
                sum(1 for code, line in pairs if line and not code and not line.startswith("/* =")),
                len(pairs))

    def manual(self):
        """[(line number, text without the leading star)] of the first comment."""
        end = self.text.find("*/")
        return [(n, re.sub(r"^ \* ?|^/\* ?", "", line))
                for n, line in enumerate(self.text[:max(end, 0)].splitlines(), 1)]

    def compile(self, flags, source='#define CRPC_IMPLEMENTATION\n#include "crpc.h"\n'):
        """Compiles the implementation; (path of the object, messages)."""
        c, o = os.path.join(self.build, "lint.c"), os.path.join(self.build, "lint.o")
        with open(c, "w") as f:
            f.write(source)
        done = run(["gcc", "-std=c99", "-DTHREADED", "-I" + self.root] + flags +
                   ["-c", c, "-o", o])
        return o, done.stderr.splitlines()[:5] if done.returncode else []


# --- the order of crpc.h --------------------------------------------------------------------


@check
def banners(tree):
    """Section tags stand in three-line banners, are unique, and api- comes before impl-."""
    rule = re.compile(r"/\* =+ \*/$")
    seen = {}
    if not tree.sections:
        yield "crpc.h:1: no section"
    for tag, number, _ in tree.sections:
        where = "crpc.h:%d: " % number
        around = tree.lines[number - 2:number - 1] + tree.lines[number:number + 1]
        if len(around) < 2 or not all(rule.match(line) for line in around):
            yield where + "the banner of %s is not three lines" % tag
        if not re.match(r"/\* >>[a-z][a-z0-9-]*\s+\S.*\*/$", tree.lines[number - 1]):
            yield where + "not of the form /* >>tag   text */"
        if tag in seen:
            yield where + "%s was already at line %d" % (tag, seen[tag])
        seen[tag] = number
        if tag.startswith("api-") and number > tree.first_impl:
            yield where + "%s comes after the implementation has begun" % tag
        if not tag.startswith(("api-", "impl-")) and tag not in OTHER_TAGS:
            yield where + "%s is neither api- nor impl-" % tag


@check
def index(tree):
    """The manual's SECTION INDEX lists the sections, in their order."""
    listed, begun = [], False
    for number, line in tree.manual():
        begun = begun or "SECTION INDEX" in line
        if begun and line.strip().startswith(">>"):
            listed += [(tag, number) for tag in re.findall(r">>([\w-]+)", line)]
    if not listed:
        yield "crpc.h:1: the manual has no SECTION INDEX with >>tags"
        return
    real = [s[0] for s in tree.sections]
    for tag, number in listed:
        if tag not in real:
            yield "crpc.h:%d: the index lists %s, which does not exist" % (number, tag)
    names = [tag for tag, _ in listed]
    for tag, number, _ in tree.sections:
        if tag not in names:
            yield "crpc.h:%d: the index lacks %s" % (number, tag)
    if sorted(names) == sorted(real) and names != real:
        wrong = next(i for i, (a, b) in enumerate(zip(names, real)) if a != b)
        yield "crpc.h:%d: the index has %s where %s stands" % (listed[wrong][1], names[wrong],
                                                              real[wrong])


@check
def prototypes(tree):
    """A prototype in the implementation is defined in the same section."""
    defined = {}
    for name, _, line, _ in tree.functions():
        defined.setdefault(name, set()).add(tree.section_of(line)[1])
    for name, kind, line, _ in tree.tags:
        if kind == "prototype" and line > tree.first_impl:
            here = tree.section_of(line)[1]
            if here not in defined.get(name, ()):
                yield "crpc.h:%d: prototype of %s, defined in %s" % (
                    line, name, ", ".join(sorted(defined.get(name, ["no section"]))))


@check
def upward(tree):
    """No section uses a public function that a later section defines."""
    owner = {}
    for name, _, line, _ in tree.functions():
        if name.startswith("crpc_"):
            owner.setdefault(name, tree.section_of(line))
    for number, line in enumerate(tree.code_lines[tree.first_impl - 1:], tree.first_impl):
        for name in re.findall(r"\bcrpc_\w+", line):
            position, tag = tree.section_of(number)
            if name in owner and owner[name][0] > position:
                yield "crpc.h:%d: %s uses %s of %s, which is below" % (number, tag, name,
                                                                       owner[name][1])


@check
def extern_c(tree):
    """No header is included inside extern "C"."""
    inside = False
    for number, line in enumerate(tree.lines, 1):
        if re.match(r'\s*extern "C" \{', line):
            inside = True
        elif inside and re.match(r"}", line) and "__cplusplus" in tree.lines[number - 2]:
            inside = False
        elif inside and re.match(r"\s*#\s*include", line):
            yield "crpc.h:%d: #include inside extern \"C\"" % number


@check
def public_structs(tree):
    """No #if inside a public struct: a toggle must never change its layout."""
    depth = begun = 0
    for number, line in enumerate(tree.code_lines[:tree.first_impl - 1], 1):
        if not begun and re.match(r"(typedef )?(struct|union)\b[^;(]*\{", line):
            begun, depth = number, 0
        if begun:
            if re.match(r"\s*#\s*(if|ifdef|ifndef|else|elif)\b", line):
                yield "crpc.h:%d: #if inside the struct of line %d" % (number, begun)
            depth += line.count("{") - line.count("}")
            begun = begun if depth > 0 else 0


# --- names ----------------------------------------------------------------------------------


@check
def names(tree):
    """Everything at file scope begins with crpc, in the implementation also with crpci."""
    for name, kind, line, _ in tree.tags:
        prefix = r"(crpc|CRPC)_" if line < tree.first_impl else r"(crpci?|CRPCI?)_"
        if not re.match(prefix, name) and not name.startswith("__anon"):
            yield "crpc.h:%d: %s %s does not begin with crpc_" % (line, kind, name)


@check
def section_names(tree):
    """Internal functions begin with crpci_<section>_."""
    for name, _, line, _ in tree.functions():
        if name.isupper():
            continue    # a macro that is used at file scope looks like a function
        tag = tree.section_of(line)[1].replace("impl-", "", 1)
        allowed = [tag.replace("-", "_")] + ALIASES.get(tag, [])
        if not name.startswith("crpc_") and not name.startswith(
                tuple("crpci_%s_" % prefix for prefix in allowed)):
            yield "crpc.h:%d: %s stands in impl-%s" % (line, name, tag)


@check
def symbols(tree):
    """The object exports only names with the prefix."""
    for flags in [["-DCRPC_ZOOKEEPER_ST=0"], ["-DCRPC_ZOOKEEPER_ST=1", "-UTHREADED"]]:
        path, wrong = tree.compile(flags)
        yield from wrong
        listed = run(["nm", "-g", "--defined-only", path]).stdout if not wrong else ""
        exported = [line.split()[-1] for line in listed.splitlines() if line.strip()]
        if not wrong and not any(s.startswith("crpc_") for s in exported):
            yield "crpc.h: the implementation exports nothing"
        for symbol in exported:
            if not symbol.startswith(("crpc_", "crpci_")):
                yield "crpc.h: exports %s" % symbol


@check
def macros(tree):
    """Only macros with the prefix are left in the file that includes crpc.h."""
    for define, prefix, foreign in [("", ("CRPC_",), set()),
                                    ("#define CRPC_IMPLEMENTATION\n", ("CRPC_", "CRPCI_", "crpci_"),
                                     FOREIGN_MACROS)]:      # crpci_: it stands for a function
        path = os.path.join(tree.build, "macros.c")
        with open(path, "w") as f:
            f.write(define + '#include "crpc.h"\n')
        done = run(["gcc", "-std=c99", "-DTHREADED", "-I" + tree.root, "-E", "-dD", path])
        if done.returncode:
            yield from done.stderr.splitlines()[:5]
            continue
        left, here = {}, False
        for line in done.stdout.splitlines():
            marker = re.match(r'# (\d+) "([^"]*)"', line)
            if marker:
                here = marker.group(2).endswith("/crpc.h")
            found = re.match(r"#(define|undef) (\w+)", line)
            if found and found.group(1) == "undef":
                left.pop(found.group(2), None)
            elif found and here:
                left[found.group(2)] = True
        if not left:
            yield "crpc.h: defines no macro at all?"
        for name in sorted(left):
            if not name.startswith(prefix) and name not in foreign:
                yield "crpc.h: leaves the macro %s behind%s" % (
                    name, " (implementation)" if define else "")


@check
def version(tree):
    """CRPC_VERSION says what its three parts say, and protoc-gen-crpc says the same."""
    parts = [re.search(r"^#define CRPC_VERSION_%s (\d+)" % p, tree.text, re.M)
             for p in ("MAJOR", "MINOR", "PATCH")]
    text = re.search(r'^#define CRPC_VERSION "([^"]*)"', tree.text, re.M)
    if not all(parts) or not text or text.group(1) != ".".join(p.group(1) for p in parts):
        yield "crpc.h: CRPC_VERSION is not MAJOR.MINOR.PATCH"
    plugin = re.search(r"^VERSION = '([^']*)'", tree.read("protoc-gen-crpc"), re.M)
    if not plugin or not text or plugin.group(1) != text.group(1):
        yield "protoc-gen-crpc: VERSION is not that of crpc.h"


# --- the object -----------------------------------------------------------------------------


@check
def writable_data(tree):
    """The object has no data that a program could write: no process-wide state."""
    for driver in [["-DCRPC_ZOOKEEPER_ST=0"], ["-DCRPC_ZOOKEEPER_ST=1", "-UTHREADED"]]:
        for pic in ["-fPIC", "-fno-pic"]:
            path, wrong = tree.compile(["-O2", pic] + driver)
            yield from wrong
            listed = run(["readelf", "-SW", path]).stdout if not wrong else ""
            for line in listed.splitlines():
                # [Nr] Name Type Address Off Size ES Flags ...
                found = re.match(r"\s*\[\s*\d+\] (\S+)\s+\S+\s+\S+\s+\S+\s+(\S+)\s+\S+\s+(\S+)", line)
                # .data.rel.ro is written by the dynamic linker only; .data.rel is not read-only
                if found and "W" in found.group(3) and int(found.group(2), 16) and \
                        not found.group(1).startswith(".data.rel.ro"):
                    yield "crpc.h: section %s has %d bytes (%s)" % (
                        found.group(1), int(found.group(2), 16), pic)


@check
def no_registry(tree):
    """Without ZooKeeper and without file:// and multicast:// no code of a registry is left."""
    path, wrong = tree.compile(["-Os", "-DCRPC_ENABLE_ZOOKEEPER=0", "-DCRPC_ENABLE_SERVERLESS=0"])
    yield from wrong
    listed = run(["nm", "--defined-only", path]).stdout if not wrong else ""
    for line in listed.splitlines():
        symbol = line.split()[-1]
        if re.match(r"crpci_(names|cache|file|multicast|zookeeper|open|coordination)_|"
                    r"crpci_server_(enrol|on_enrol|withdraw)|crpci_channel_.*regist|crpc_registry_",
                    symbol) and symbol != "crpci_channel_has_registry":
            yield "crpc.h: %s is compiled in although there is no registry" % symbol


# --- documentation --------------------------------------------------------------------------


@check
def documented(tree):
    """A comment stands directly above every public function."""
    count = 0
    for number, line in enumerate(tree.lines[:tree.first_impl - 1], 1):
        if re.match(r"(CRPC_API|static inline) ", line):
            count += 1
            if not tree.lines[number - 2].endswith("*/"):
                yield "crpc.h:%d: no comment directly above" % number
    if not count:
        yield "crpc.h: no public function was found"


def comments_of(tree, first, last):
    """{line of a member: text of its comments} for the struct at lines first..last."""
    offsets = [0]
    for line in tree.lines:
        offsets.append(offsets[-1] + len(line) + 1)
    texts = {}
    for found in re.finditer(r"/\*(.*?)\*/", tree.text[offsets[first]:offsets[last]], re.S):
        begin = offsets[first] + found.start()
        line = tree.text.count("\n", 0, begin) + 1
        end = line + found.group().count("\n")
        if tree.code_lines[line - 1].strip():       # behind a member
            texts[line] = texts.get(line, "") + found.group(1)
        else:                                       # above the member that follows
            texts[end + 1] = found.group(1) + texts.get(end + 1, "")
    return texts


@check
def option_values(tree):
    """Every integer option says what 0 means, and what -1 (or, for a switch, 1) means."""
    begun, count = None, 0
    for number, line in enumerate(tree.code_lines[:tree.first_impl - 1], 1):
        found = re.match(r"(?:typedef )?struct (crpc_\w+_options|crpc_call|crpc_hooks|"
                         r"crpc_policy|crpc_limits|crpc_method_limit) \{", line)
        if found:
            begun = (found.group(1), number)
        elif begun and re.match(r"}", line):
            texts = comments_of(tree, begun[1], number)
            for at in range(begun[1] + 1, number):
                if re.match(r"\s*/\* --- out", tree.lines[at - 1]):
                    break
                member = re.match(r"\s+(?:int|long|short|int\d+_t) (\w+)(, \w+)*;",
                                  tree.code_lines[at - 1])
                if member:
                    count += 1
                    text = texts.get(at, "")
                    if not re.search(r"\b0:", text) or not re.search(r"(-1|\b1):", text):
                        yield "crpc.h:%d: %s.%s: what do 0: and -1: mean?" % (
                            at, begun[0], member.group(1))
            begun = None
    if not count:
        yield "crpc.h: no integer option was found"


def samples(tree):
    """[(place, name, language, text)] of the samples in README.md and the manual."""
    found = []
    language, block, begun = None, [], 0
    for number, line in enumerate(tree.read("README.md").splitlines(), 1):
        fence = re.match(r"```\s*(\S*)", line)
        if fence and language is None:
            language, block, begun = fence.group(1), [], number
        elif fence:
            found.append(("README.md:%d" % begun, "readme_%d" % begun, language, "\n".join(block)))
            language = None
        elif language is not None:
            block.append(line)
    name = None
    for number, line in tree.manual():
        example = re.search(r"@example (\w+)", line)
        if example:
            name, block, begun = example.group(1), [], number
        elif name and "@end" in line:
            found.append(("crpc.h:%d" % begun, "manual_" + name, "c", "\n".join(block)))
            name = None
        elif name:
            block.append(line)
    return found


@check
def samples_compile(tree):
    """The samples of README.md and of the manual compile, as C99 and as C++17."""
    found = samples(tree)
    for place in ["README.md", "crpc.h"]:
        if not any(s[0].startswith(place + ":") and s[2] == "c" for s in found):
            yield "%s: no sample" % place
    directory = os.path.join(tree.build, "samples")
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    for place, _, language, text in found:
        name = re.match(r"// (\w+\.proto)", text)
        if language == "proto" and name:
            plugin = os.path.join(tree.root, "protoc-gen-crpc")
            with open(os.path.join(directory, name.group(1)), "w") as f:
                f.write(text + "\n")
            done = run(["protoc", "-I.", "-I" + run([plugin, "--nanopb-proto"]).stdout.strip(),
                        "--plugin=protoc-gen-crpc=" + plugin,
                        "--nanopb_out=.", "--crpc_out=.", name.group(1)], cwd=directory)
            if done.returncode:
                yield "%s: %s" % (place, " ".join(done.stderr.splitlines()[:3]))
    includes = ["-I" + d for d in [tree.root, directory] + tree.includes]
    for place, name, language, text in found:
        if language == "c":
            path = os.path.join(directory, name + ".c")
            with open(path, "w") as f:
                f.write(text + "\n")
            for compiler in [["gcc", "-std=c99"], ["g++", "-x", "c++", "-std=c++17"]]:
                done = run(compiler + ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-DTHREADED"] +
                           includes + ["-c", path, "-o", path[:-1] + "o"])
                if done.returncode:
                    errors = [m for m in done.stderr.splitlines() if "error" in m][:3]
                    yield "%s: not valid %s: %s" % (place, compiler[-1], " | ".join(errors))


# --- tests and files ------------------------------------------------------------------------


@check
def test_files(tree):
    """Each section of the implementation has its test file with tests in it, and the reverse."""
    wanted = {"test_%s.c" % s[0][len("impl-"):].replace("-", "_")
              for s in tree.sections if s[0].startswith("impl-")}
    there = {os.path.basename(n) for n in tree.files() if re.match(r"crpc_impl_tests/test_\w+\.c$", n)}
    for name in sorted(wanted - there):
        yield "crpc_impl_tests/%s: missing" % name
    for name in sorted(there - wanted - set(EXTRA_TESTS)):
        yield "crpc_impl_tests/%s: there is no such section" % name
    for name in sorted(there):
        text = blank_out(tree.read("crpc_impl_tests/" + name))
        if not re.search(r"\b(cmocka_unit_test\w*|CT_TEST)\(", text):
            yield "crpc_impl_tests/%s: no test in it" % name
        if not re.search(r"^#define CRPC_IMPLEMENTATION\b", text, re.M):
            yield "crpc_impl_tests/%s: does not define CRPC_IMPLEMENTATION" % name


@check
def function_length(tree):
    """No function of crpc.h is longer than 80 lines, but for listed ones."""
    long = [(last - line + 1, name, line) for name, _, line, last in tree.functions()
            if last - line + 1 > MAX_FUNCTION_LINES]
    for lines, name, line in sorted(long, reverse=True):
        if name not in LONG_FUNCTIONS:
            yield "crpc.h:%d: %s has %d lines" % (line, name, lines)
    for name in sorted(LONG_FUNCTIONS - {f[1] for f in long}):
        yield "lint.py: LONG_FUNCTIONS names %s, which is not long" % name


@check
def volume(tree):
    """crpc.h, its code and its sections stay within their lines; there are comments enough."""
    code, comments, lines = tree.volume()
    percent = 100.0 * comments / max(lines, 1)
    if len(tree.lines) > MAX_LINES:
        yield "crpc.h: %d lines, at most %d" % (len(tree.lines), MAX_LINES)
    if code > MAX_CODE_LINES:
        yield "crpc.h: %d lines of code in the implementation, at most %d" % (code, MAX_CODE_LINES)
    if lines > MAX_SECTION_LINES and not COMMENT_PERCENT[0] <= percent <= COMMENT_PERCENT[1]:
        yield "crpc.h: %.1f %% of the implementation's lines are comments, expected %d to %d" % (
            (percent,) + COMMENT_PERCENT)
    for tag, first, end in tree.sections:
        if end - first > MAX_SECTION_LINES and tag not in LONG_SECTIONS:
            yield "crpc.h:%d: %s has %d lines" % (first, tag, end - first)


@check
def unfinished(tree):
    """No marks of unfinished work."""
    # in pieces, so that this file passes
    marks = re.compile(r"\b(%s)\b" % "|".join(["TO" "DO", "FIX" "ME", "XX" "X", "HA" "CK"]), re.I)
    for name, text in tree.texts():
        for number, line in enumerate(text.splitlines(), 1):
            if marks.search(line):
                yield "%s:%d: %s" % (name, number, line.strip()[:80])


@check
def machine_paths(tree):
    """No path of one particular machine."""
    path = re.compile(r"""(^|[\s"'`=(<>,:;])/(home|root|work|Users|builds|workspace|mnt)/\w""")
    for name, text in tree.texts():
        for number, line in enumerate(text.splitlines(), 1):
            if path.search(re.sub(r"\w+://\S*", "", line)):     # not in a URL
                yield "%s:%d: %s" % (name, number, line.strip()[:80])


@check
def whitespace(tree):
    """No trailing blanks, no tabs in C, a newline at the end, crpc.h within 100 columns."""
    for name, text in tree.texts():
        for number, line in enumerate(text.split("\n"), 1):
            if line != line.rstrip():
                yield "%s:%d: blanks at the end" % (name, number)
            if "\t" in line and name.endswith((".c", ".h")):
                yield "%s:%d: tab" % (name, number)
            if name == "crpc.h" and len(line) > MAX_COLUMNS:
                yield "%s:%d: %d columns" % (name, number, len(line))
        if text and not text.endswith("\n"):
            yield "%s: no newline at the end" % name


@check
def top_level(tree):
    """The top level holds what the layout allows."""
    for name in sorted({n.split("/")[0] for n in tree.files()}):
        if name not in TOP_LEVEL and not name.startswith("."):
            yield "%s: does not belong at the top level" % name


# --- the checks checked ---------------------------------------------------------------------

SAMPLE = {
    "Makefile": "all:\n\techo\n",
    "protoc-gen-crpc": "VERSION = '1.2.3'\n",
    "README.md": '# sample\n\n```c\n#include "crpc.h"\n'
                 'int main(void) { return crpc_one_get(0); }\n```\n',
    "crpc_impl_tests/test_one.c": '#define CRPC_IMPLEMENTATION\n#include "../crpc.h"\n'
                                  'x = {cmocka_unit_test(it)};\n',
    "crpc_impl_tests/test_two.c": '#define CRPC_IMPLEMENTATION\n#include "../crpc.h"\n'
                                  'x = {CT_TEST(it)};\n',
    "crpc.h": """\
/* sample - follows the rules
 *
 * SECTION INDEX
 *   >>config     limits
 *   >>api-one    one
 *   >>impl-one   one
 *   >>impl-two   two
 *
 * QUICK START
 *
 * @example start
 * #define CRPC_IMPLEMENTATION
 * #include "crpc.h"
 * int main(void) { return crpc_two_get(0); } // see >>api-one
 * @end
 */
#ifndef CRPC_H_INCLUDED
#define CRPC_H_INCLUDED

/* ==== */
/* >>config   limits */
/* ==== */

#define CRPC_VERSION_MAJOR 1
#define CRPC_VERSION_MINOR 2
#define CRPC_VERSION_PATCH 3
#define CRPC_VERSION "1.2.3"
#define CRPC_API extern

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== */
/* >>api-one   one */
/* ==== */

typedef struct crpc_one_options {
    int wait_ms; /* how long. 0: a second. -1: not
                    at all */
    /* 1: hurry. 0: do not */
    int hurry;
    const char *name;
} crpc_one_options;

/* Gets. */
CRPC_API int crpc_one_get(int x);

/* Gets twice. */
CRPC_API int crpc_two_get(int x);

#ifdef __cplusplus
}
#endif
#endif

#if defined(CRPC_IMPLEMENTATION) && !defined(CRPC_IMPLEMENTATION_INCLUDED)
#define CRPC_IMPLEMENTATION_INCLUDED

/* ==== */
/* >>impl-one   one */
/* ==== */

#define CRPCI_ONE 1

static int crpci_one_b(int x);

static int crpci_one_a(int x)
{
    return x ? crpci_one_b(x - 1) : CRPCI_ONE;
}

static int crpci_one_b(int x)
{
    return crpci_one_a(x);
}

CRPC_API int crpc_one_get(int x)
{
    static const char *const names[] = {"a", "b"};
    return crpci_one_b(x) + names[x & 1][0];
}

/* ==== */
/* >>impl-two   two */
/* ==== */

CRPC_API int crpc_two_get(int x)
{
    return 2 * crpc_one_get(x);
}

#endif
""",
}

# (check, file, what to replace, by what): each must make the check fail.
BROKEN = [
    ("banners", "crpc.h", "/* ==== */\n/* >>impl-two", "\n/* >>impl-two"),
    ("banners", "crpc.h", ">>impl-two   two */", ">>impl-one   two */"),
    ("banners", "crpc.h", ">>impl-two   two */", ">>api-late   two */"),
    ("banners", "crpc.h", "/* >>api-one   one */", "/* >>public-one   one */"),
    ("banners", "crpc.h", "/* >>api-one   one */", "/* >>api-one */"),
    ("index", "crpc.h", " *   >>impl-two   two\n", ""),
    ("index", "crpc.h", " *   >>impl-two   two\n", " *   >>impl-two   two\n *   >>impl-three   3\n"),
    ("index", "crpc.h", " *   >>impl-one   one\n *   >>impl-two   two\n",
     " *   >>impl-two   two\n *   >>impl-one   one\n"),
    ("index", "crpc.h", "SECTION INDEX", "SECTIONS"),
    ("prototypes", "crpc.h", "#define CRPCI_ONE 1", "static int crpci_two_x(int x);"),
    ("prototypes", "crpc.h", "#define CRPCI_ONE 1", "CRPC_API int crpc_two_get(int x);"),
    ("upward", "crpc.h", "return crpci_one_b(x) +", "return crpc_two_get(x) +"),
    ("extern-c", "crpc.h", 'extern "C" {\n#endif', 'extern "C" {\n#endif\n#include <stddef.h>'),
    ("public-structs", "crpc.h", "    int hurry;", "#if CRPC_VERSION_MAJOR\n    int hurry;\n#endif"),
    ("names", "crpc.h", "static int crpci_one_a(int x)", "static int one_a(int x)"),
    ("names", "crpc.h", "/* Gets. */", "typedef int one_number;\n/* Gets. */"),
    ("names", "crpc.h", "/* Gets. */", "typedef int crpci_number;\n/* Gets. */"),
    ("section-names", "crpc.h", "static int crpci_one_a(int x)", "static int crpci_two_a(int x)"),
    ("symbols", "crpc.h", "static int crpci_one_a(int x)\n", "int helper(void);\nint helper(void)"
     " { return 1; }\nstatic int crpci_one_a(int x)\n"),
    ("macros", "crpc.h", "#define CRPCI_ONE 1", "#define CRPCI_ONE 1\n#define ONE 1"),
    ("macros", "crpc.h", "#define CRPC_API extern", "#define CRPC_API extern\n#define CRPCI_E 1"),
    ("version", "crpc.h", '"1.2.3"', '"1.2.4"'),
    ("version", "protoc-gen-crpc", "1.2.3", "1.2.4"),
    ("writable-data", "crpc.h", "    static const char *const names[]", "    static int calls;\n"
     "    x += calls++;\n    static const char *const names[]"),
    ("writable-data", "crpc.h", "    static const char *const names[]", "    static __thread int calls;\n"
     "    x += calls++;\n    static const char *const names[]"),
    ("writable-data", "crpc.h", "#define CRPCI_ONE 1", "#define CRPCI_ONE 1\nint crpc_state;"),
    ("no-registry", "crpc.h", "#define CRPCI_ONE 1",
     "int crpci_cache_one(void);\nint crpci_cache_one(void) { return 1; }"),
    ("documented", "crpc.h", "/* Gets twice. */\n", ""),
    ("documented", "crpc.h", "/* Gets twice. */\n", "/* Gets twice. */\n\n"),
    ("option-values", "crpc.h", "0: a second. ", ""),
    ("option-values", "crpc.h", "-1: not", "never"),
    ("option-values", "crpc.h", "1: hurry. ", ""),
    ("samples-compile", "crpc.h", " * int main(void) { return crpc_two_get(0)",
     " * int main(void) { return crpc_two_get()"),
    ("samples-compile", "README.md", "crpc_one_get(0)", "crpc_one_got(0)"),
    ("samples-compile", "README.md", "int main(void)", "int *p = (void *)0; int q = *(int *)(p = "
     "malloc(1)); int main(void)"),
    ("samples-compile", "README.md", "```c", "```text"),
    ("samples-compile", "crpc.h", "@example start", "example:"),
    ("test-files", "crpc_impl_tests/test_two.c", None, None),
    ("test-files", "crpc_impl_tests/test_two.c", "CT_TEST(it)", "/* CT_TEST(it) */"),
    ("test-files", "crpc_impl_tests/test_two.c", "CRPC_IMPLEMENTATION", "CRPC_IMPLEMENATION"),
    ("test-files", "crpc_impl_tests/test_three.c", None, "CT_TEST(x)\n"),
    ("function-length", "crpc.h", "    return 2 * crpc_one_get(x);\n",
     "    x++;\n" * 80 + "    return 2 * crpc_one_get(x);\n"),
    ("volume", "crpc.h", "#define CRPCI_ONE 1", "#define CRPCI_ONE 1\n" + "\n" * MAX_SECTION_LINES),
    ("volume", "crpc.h", "#define CRPCI_ONE 1", "int x;\n" * (MAX_CODE_LINES + 1)),
    ("volume", "crpc.h", "#define CRPC_API extern", "\n" * MAX_LINES),
    ("unfinished", "crpc.h", "/* Gets twice. */", "/* Gets twice. TO" "DO */"),
    ("unfinished", "Makefile", "all:", "# ha" "ck\nall:"),
    ("machine-paths", "Makefile", "echo", "echo /ho" "me/me/crpc"),
    ("whitespace", "crpc.h", "/* Gets twice. */", "/* Gets twice. */ "),
    ("whitespace", "crpc.h", "    return 2", "\treturn 2"),
    ("whitespace", "crpc.h", "/* Gets twice. */", "/* Gets" + " twice" * 20 + ". */"),
    ("whitespace", "Makefile", "echo\n", "echo"),
    ("top-level", "src.c", None, "int x;\n"),
]


def self_test():
    """[(name, what is wrong)]: the good sample passes each check, the broken ones do not."""
    results = []

    def sample(changes):
        root = tempfile.mkdtemp(prefix="crpc-lint-")
        for name, text in dict(SAMPLE, **changes).items():
            if text is not None:
                os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
                with open(os.path.join(root, name), "w") as f:
                    f.write(text)
        return root

    def problems(name, changes):
        root = sample(changes)
        build = tempfile.mkdtemp(prefix="crpc-lint-")
        found = list(CHECKS[name](Tree(root, build)))
        shutil.rmtree(root)
        shutil.rmtree(build)
        return found

    for name in CHECKS:
        found = problems(name, {})
        results.append((name + " accepts a good sample", "; ".join(found)))
        if not any(b[0] == name for b in BROKEN):
            results.append((name + " rejects a bad sample", "there is none"))
    for name, file, old, new in BROKEN:
        text = SAMPLE.get(file, "")
        wrong = ""
        if old is not None and text.count(old) != 1:
            wrong = "%r occurs %d times in the sample" % (old, text.count(old))
        elif not problems(name, {file: new if old is None else text.replace(old, new)}):
            wrong = "accepts: %s: %s -> %s" % (file, old, new)
        results.append(("%s rejects a bad sample" % name, wrong))
    return results


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--self-test", action="store_true", help="only that")
    arguments.add_argument("--build", default="build/lint")
    arguments.add_argument("--include", action="append", default=[])
    arguments.add_argument("checks", nargs="*")
    options = arguments.parse_args()
    unknown = [c for c in options.checks if c not in CHECKS]
    if unknown:
        sys.exit("lint.py: the checks are: " + " ".join(CHECKS))

    passed = failed = 0
    if not options.checks:
        results = self_test()
        for name, wrong in results:
            if wrong:
                print("FAIL self-test: %s: %s" % (name, wrong))
        failed = sum(1 for r in results if r[1])
        passed = len(results) - failed
        print("self-test: %d passed, %d failed" % (passed, failed))
    if not options.self_test:
        tree = Tree(ROOT, os.path.abspath(options.build),
                    [os.path.abspath(i) for i in options.include])
        print("implementation: %d lines of code, %d of comments, %d in all" % tree.volume())
        for name in options.checks or CHECKS:
            found = list(CHECKS[name](tree))
            print("%-5s %-16s %s" % ("FAIL" if found else "ok", name, CHECKS[name].__doc__))
            for problem in found[:20]:
                print("      " + problem)
            if len(found) > 20:
                print("      and %d more" % (len(found) - 20))
            passed, failed = passed + (not found), failed + bool(found)
    print("\n%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
