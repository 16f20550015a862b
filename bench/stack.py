"""The stack that crpc's own functions need, from gcc's -fcallgraph-info=su. bench/footprint.py uses it.

A call through a pointer is resolved by the name of the member that is called: c->up->closed(c) calls
every function of a table of operations that has _closed in its name. OTHER names what stands in no
table. What the program installs (PROGRAM: hooks, handlers, callbacks) is where crpc's own stack ends:
what it calls in turn begins anew. A member that is neither is an error.

Functions call each other in circles (closing a connection tells the section above, which may close
it), but no circle is gone through twice: a second closing returns at once. So the deepest way is one
on which no function stands twice. It may still be one that cannot be gone; REFUSED says which steps.
"""
import re

SYNCHRONOUS = {"crpc_channel_call"}
STEPS = 30000       # of the search, for each function that it begins with

PROGRAM = set("""clock_us resize log resolve before after fallback dropped post on_timer on_event
    deliver serve pending on_lock on_election authenticate""".split())

# member: kinds of what is registered, or patterns of functions' names
OTHER = {
    "run": ["task"],
    "fn": ["timer", "watch"],
    "usable": ["crpci_providers_usable"],
    "in_group": ["crpci_cluster_tried"],
    "want": [],         # no transport has one yet
    "destroy": ["crpci_lifecycle_free"],
    "measure": ["crpci_balance_measure"],
    "push": ["crpci_opening_on_list"],
    "tell": ["crpci_enrolment_on_status"],
    "status": ["crpci_enrolment_on_status"],
    "screen": ["crpci_auth_screen"],
    "age": ["crpci_zk_directory_age"],
    "release": [r"crpci_(zk|config|queue|agreement)_\w*(release|unref|drop|free)"],
    "value": [r"crpci_(zk|config|queue)_\w*(value|changed)"],
}

# (caller, callee): steps that the code does not take.
REFUSED = [
    # The lists of input to go on with and of output to be sent hold connections' tasks alone.
    # Only a step runs those of the former (ADDED).
    (r"crpci_loop_run_list", r"crpci_(?!conn_flush)\w+"),
    (r"crpci_loop_run_ready", r"crpci_conn_\w+"),
    (r"crpci_worker_thread", r"crpci_(?!context_task)\w+"),
    # The last reference of a server is not dropped while its loop works for it.
    (r"crpci_context_(reject|reply|run)|crpci_listener_on_accept|crpci_lifecycle_drain_tick",
     r"crpci_(context_(release|drop_server)|lifecycle_free)"),
]


# (caller, callee): steps that take a list's place.
ADDED = [("crpci_drive_step", "crpci_conn_resume_task")]


def installed(source):
    """{kind: names of functions}: of tables, and of timers, watches and tasks."""
    kinds = {"table": set()}
    for kind in ("timer", "watch", "task"):
        kinds[kind] = set(re.findall(r"crpci_(?:\w+_)?%s_init\([^;]*?,\s*(crpci_\w+)\);" % kind,
                                     source))
    for body in re.findall(r"static const crpci_\w+ \w+(?:\[[^]]*\])?\s*= \{(.*?)\};", source, re.S):
        kinds["table"].update(re.findall(r"\bcrpci_\w+", body))
    return kinds


class Stack:
    def __init__(self, graph, source):
        """graph: the text of the .ci file of one object; source: that of crpc.h."""
        self.frames, self.calls, self.unknown = {}, {}, set()
        kinds, lines = installed(source), source.split("\n")
        for title, label in re.findall(r'node: \{ title: "([^"]*)" label: "([^"]*)"', graph):
            size = re.search(r"\\n(\d+) bytes", label)
            self.frames[self.short(title)] = int(size.group(1)) if size else 0
        for caller, callee, label in re.findall(
                r'edge: \{ sourcename: "([^"]*)" targetname: "([^"]*)" label: "([^"]*)"', graph):
            caller, callee = self.short(caller), self.short(callee)
            callees = {callee}
            if callee == "__indirect_call":
                callees = set()
                for number in re.findall(r":(\d+):\d+", label):
                    for member in re.findall(r"(?:->|\.)(\w+)\(", lines[int(number) - 1]):
                        callees |= self.resolve(caller, member, kinds)
            self.calls.setdefault(caller, set()).update(
                c for c in callees if c in self.frames and not self.refused(caller, c))
        for caller, callee in ADDED:
            if caller in self.frames and callee in self.frames:
                self.calls.setdefault(caller, set()).add(callee)
        self.order()

    @staticmethod
    def short(title):
        return title.split(":")[-1]

    @staticmethod
    def refused(caller, callee):
        return any(re.match(r"(%s)(\.|$)" % a, caller) and re.match(r"(%s)(\.|$)" % b, callee)
                   for a, b in REFUSED)

    def resolve(self, caller, member, kinds):
        found = set()
        for name in self.frames:
            plain = name.split(".")[0]
            if plain in kinds["table"] and re.search(r"_%s(_|$)" % member, plain):
                found.add(name)
            for other in OTHER.get(member, ()):
                if re.fullmatch(other, plain) or plain in kinds.get(other, ()):
                    found.add(name)
        known = any(re.search(r"_%s(_|$)" % member, name) for name in kinds["table"])
        if not known and member not in PROGRAM and member not in OTHER:
            self.unknown.add("%s in %s" % (member, caller))
        return found

    def order(self):
        """Callees in the order of what a walk that ignores circles finds below them."""
        depth = {}

        def visit(v):
            depth[v] = 0        # while it is being visited
            below = [visit(w) if w not in depth else depth[w] for w in self.calls.get(v, ())]
            depth[v] = self.frames[v] + max(below, default=0)
            return depth[v]

        for v in sorted(self.frames):
            if v not in depth:
                visit(v)
        self.below = {v: sorted(self.calls[v], key=lambda w: (-depth[w], w)) for v in self.calls}

    def longest(self, root):
        """(bytes, [(function, frame)]) of the deepest way on which no function is entered twice. The
        search goes first where most is below, and ends after STEPS. A synchronous call runs no user
        code (P8)."""
        best, steps = [0, []], [STEPS]
        way, on = [], {"crpci_loop_run_ready"} if root in SYNCHRONOUS else set()

        def visit(v, used):
            steps[0] -= 1
            way.append(v)
            on.add(v)
            used += self.frames[v]
            if used > best[0]:
                best[:] = [used, list(way)]
            for w in self.below.get(v, ()):
                if w not in on and steps[0] > 0:
                    visit(w, used)
            on.discard(way.pop())

        visit(root, 0)
        return best[0], [(v, self.frames[v]) for v in best[1]]

    def roots(self):
        """{name: (bytes, way)} of public functions and of threads' functions."""
        return {name: self.longest(name) for name in self.frames
                if name.startswith("crpc_") or re.fullmatch(r"crpci_\w+_thread", name)}
