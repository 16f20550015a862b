#!/usr/bin/python3
"""A fleet survives: providers and consumers of examples/fleet/ as processes, a real ZooKeeper, and
what can happen to them: restarts, kill -9, a registry that is gone, wiped, frozen or full of
nonsense, a provider that is slow, a cluster that fails altogether.

    fleet.py [NAME...]      only the tests whose name contains one of these

Needs what `make examples` generates; the programs are built once more, with ASan and UBSan. Every
process that ends in order has to exit with 0 and without a complaint of a sanitizer.
CRPC_FLEET_LONG=1 keeps ZooKeeper without a quorum for 60 s instead of 6, and away for 60 s instead of
10. The last line is "N passed, N failed".

crpc-test-timeout: 480
"""
import fnmatch
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse

from kazoo.client import KazooClient
from kazoo.security import make_acl, make_digest_acl

import _build
import _zookeeper

PROGRAMS = os.path.join(_build.BUILD, "fleet")
SERVICE = "fleet.Work"
SESSION_MS = 1000
LAME_MS = 500
# From when the registry is back, to when everybody follows it: two sessions, because that is how
# long a lost one is given, and the attempts to reach it.
WHOLE_S = 5
NO_QUORUM_S = 60 if os.environ.get("CRPC_FLEET_LONG") else 6
GONE_S = 60 if os.environ.get("CRPC_FLEET_LONG") else 10


def environment():
    env = dict(os.environ)
    env.setdefault("ASAN_OPTIONS", "detect_leaks=1:detect_stack_use_after_return=1")
    env.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
    env.setdefault("LSAN_OPTIONS", "print_suppressions=0:suppressions=" +
                   os.path.join(os.path.dirname(_build.HERE), "lsan.supp"))
    return env


def await_true(seconds, condition, what):
    """What the condition gives as soon as it is true."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("not within %g s: %s" % (seconds, what))
        time.sleep(0.02)


# --- processes ------------------------------------------------------------------------------------

class Process:
    """A program of examples/fleet/; what it prints arrives in self.lines."""

    def __init__(self, *command):
        self.log = tempfile.TemporaryFile()
        self.lines = []             # (when, text)
        self.child = subprocess.Popen(
            [os.path.join(PROGRAMS, command[0]), *map(str, command[1:])],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment(), preexec_fn=_zookeeper.die_with_parent)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.child.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def alive(self):
        return self.child.poll() is None

    def signal(self, signo):
        self.child.send_signal(signo)

    def complaints(self):
        # not read(): the program writes where this descriptor's position is
        return os.pread(self.log.fileno(), 1 << 20, 0).decode(errors="replace")

    def finish(self, seconds=15):
        """Waits until it has ended, as it should; its last line."""
        try:
            status = self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "still running"
        self.reader.join(5)
        said = self.complaints()
        if status != 0 or "anitizer" in said or "runtime error" in said:
            raise AssertionError("%s: status %s\n%s\n%s" % (
                self.child.args[0], status, "\n".join(line for _, line in self.lines[-5:]),
                said[-6000:]))
        return self.lines[-1][1]

    def kill(self):
        self.child.kill()
        self.child.wait()

    def dispose(self):
        self.kill()
        self.reader.join(5)
        self.child.stdout.close()
        self.log.close()


class Provider(Process):
    def __init__(self, registry, name, *options, port=0):
        super().__init__("fleet_provider", registry, "--id", name, "--listen",
                         "tcp://127.0.0.1:%d" % port, "--session-ms", SESSION_MS, *options)
        self.name = name
        self.address = None

    def ready(self, seconds=15):
        await_true(seconds, lambda: self.lines or not self.alive(), "provider " + self.name)
        if not self.lines or not self.lines[0][1].startswith("ready "):
            raise AssertionError("%s: %s" % (self.name, self.complaints()[-3000:]))
        self.address = self.lines[0][1].split()[1].replace("tcp://", "")
        return self

    def stop(self):
        """Stops it in order: how many requests it executed, how many of them again."""
        self.signal(signal.SIGTERM)
        words = self.finish().split()
        return int(words[3]), int(words[5])


class Second:
    """What a consumer says every second."""
    PATTERN = re.compile(r" *\d+ s  ok (\d+)  failed (\d+)  p99 ([\d.]+) ms  listed (\d+)  by(.*)")

    def __init__(self, when, found):
        self.when = when
        self.ok, self.failed, self.listed = (int(found.group(i)) for i in (1, 2, 4))
        self.p99_ms = float(found.group(3))
        self.by = {name: int(n) for name, n in (
            word.rsplit(":", 1) for word in found.group(5).split())}


class Consumer(Process):
    def __init__(self, url, *options, rate=500, seconds=600, method="Do"):
        super().__init__("fleet_consumer", url, "--rate", rate, "--seconds", seconds, "--method",
                         method, *options)

    def seconds(self):
        found = [(when, Second.PATTERN.match(line)) for when, line in list(self.lines)]
        return [Second(when, match) for when, match in found if match]

    def await_second(self, limit, condition, what, since=None):
        """The first full second after `since` (now) for which the condition is true; it is over
        within `limit` seconds."""
        since = since or time.monotonic()

        def found():
            if not self.alive():
                raise AssertionError("the consumer has ended: " + self.complaints()[-3000:])
            return [s for s in self.seconds() if s.when >= since + 1 and condition(s)]
        try:
            return await_true(since + limit - time.monotonic(), found, what)[0]
        except AssertionError:
            print("\n".join(line for _, line in self.lines), file=sys.stderr)
            raise

    def stop(self):
        self.signal(signal.SIGTERM)
        return self.result()

    def result(self, seconds=30):
        result = json.loads(self.finish(seconds))
        result["said"] = self.complaints()
        return result


class Scenario(unittest.TestCase):
    """Every test has a registry of its own: a root in the class's ZooKeeper."""
    maxDiff = None
    servers = 1

    @classmethod
    def setUpClass(cls):
        cls.zookeeper = _zookeeper.Ensemble(cls.servers)
        cls.zookeeper.__enter__()
        cls.addClassCleanup(cls.zookeeper.__exit__)

    def setUp(self):
        self.root = "/" + self.id().rsplit(".", 1)[1]
        self.registry = "zookeeper://%s%s" % (self.zookeeper.hosts, self.root)
        self.directory = "%s/%s/providers" % (self.root, SERVICE)

    def url(self, options=""):
        return "%s/%s?session_timeout_ms=%d&%s" % (self.registry, SERVICE, SESSION_MS, options)

    def provider(self, name, *options, registry=None, **more):
        provider = Provider(registry or self.registry, name, "--lame-ms", LAME_MS, *options,
                            **more)
        self.addCleanup(provider.dispose)
        return provider

    def consumer(self, options="", *arguments, url=None, **more):
        consumer = Consumer(url or self.url(options), *arguments, **more)
        self.addCleanup(consumer.dispose)
        return consumer

    def client(self):
        """Somebody else's ZooKeeper client."""
        client = KazooClient(self.zookeeper.hosts, timeout=10)
        client.start(15)
        self.addCleanup(client.close)
        self.addCleanup(client.stop)
        return client

    def await_listed(self, count, seconds=15):
        client = self.client()
        await_true(seconds, lambda: client.exists(self.directory) and
                   len(client.get_children(self.directory)) == count, "%d are listed" % count)
        return client

    def fleet(self, *options, names="abc", **more):
        """Providers that are registered."""
        providers = {name: self.provider(name, *options, **more) for name in names}
        for provider in providers.values():
            provider.ready()
        self.await_listed(len(names))
        return providers

    def all_answered(self, result):
        """Not a call failed, was executed twice, or was not made."""
        self.assertEqual((result["failed"], result["by_code"], result["duplicates"],
                          result["sent"] - result["ok"], result["unsent"]), (0, {}, 0, 0, 0), result)

    def each_has_traffic(self, consumer, names, limit=WHOLE_S, only=True, since=None):
        """Within so many seconds there is one in which these answer (and no others do)."""
        return consumer.await_second(
            limit, lambda s: set(s.by) == set(names) or not only and set(s.by) > set(names),
            "answers by " + ", ".join(names), since)


# --- providers come and go ------------------------------------------------------------------------

class Providers(Scenario):
    def test_rolling_restart(self):
        ports = dict(zip("abc", _zookeeper.free_ports(3)))
        fleet = {name: self.provider(name, port=port).ready() for name, port in ports.items()}
        self.await_listed(3)
        consumer = self.consumer("retries=-1", rate=1000)
        self.each_has_traffic(consumer, "abc")
        executed = repeated = 0
        for name, port in ports.items():    # each comes back on the address that it had
            counts = fleet[name].stop()
            executed, repeated = executed + counts[0], repeated + counts[1]
            fleet[name] = self.provider(name, port=port).ready()
            self.each_has_traffic(consumer, "abc")
        result = consumer.stop()
        self.all_answered(result)
        for provider in fleet.values():
            counts = provider.stop()
            executed, repeated = executed + counts[0], repeated + counts[1]
        self.assertEqual((executed, repeated), (result["sent"], 0))
        self.assertLess(result["max_gap_ms"], 3000)     # on a machine that does other things too

    def kill_one_of_three(self, method):
        fleet = self.fleet("--delay-ms", 20)
        consumer = self.consumer("timeout_ms=2000", rate=600, method=method)
        self.each_has_traffic(consumer, "abc")
        fleet["b"].kill()
        second = self.each_has_traffic(consumer, "ac")
        self.assertGreater(second.ok, 300)
        result = consumer.stop()
        counts = {name: fleet[name].stop() for name in "ac"}
        self.assertEqual(result["duplicates"], 0)
        self.assertEqual(result["ok"] + result["failed"], result["sent"])
        self.assertEqual(result["unsent"], 0)
        return result, counts

    def test_kill_9_and_idempotent_calls(self):
        result, counts = self.kill_one_of_three("Get")
        self.all_answered(result)
        # it was really in the way
        self.assertGreater(result["attempts"], result["sent"])
        # and who had nothing to do with it was not asked twice
        self.assertEqual({name: repeated for name, (_, repeated) in counts.items()},
                         {"a": 0, "c": 0})

    def test_kill_9_and_other_calls(self):
        result, counts = self.kill_one_of_three("Do")
        # 600 a second, a third of them there, 20 ms each: about 4 are under way
        self.assertGreater(result["failed"], 0, "nothing was under way on the one that was killed")
        self.assertLess(result["failed"], 40)
        self.assertEqual(result["by_code"], {"ECONN": result["failed"]})
        # what the others executed is what they were seen to answer: nothing that had failed
        for name, (executed, repeated) in counts.items():
            self.assertEqual((executed, repeated), (result["by_provider"][name], 0), name)


# --- the registry fails ---------------------------------------------------------------------------

class Registry(Scenario):
    def test_gone_and_wiped(self):
        self.zookeeper = _zookeeper.Ensemble()      # of its own
        self.addCleanup(self.zookeeper.__exit__)
        self.zookeeper.__enter__()
        self.setUp()
        server, = self.zookeeper.servers
        fleet = self.fleet()
        consumer = self.consumer()
        self.each_has_traffic(consumer, "abc")
        server.crash()
        gone = time.monotonic()
        time.sleep(GONE_S)
        for second in consumer.seconds():
            if second.when >= gone:
                self.assertEqual((set(second.by), second.failed), (set("abc"), 0))
        server.wipe()
        server.launch()
        server.await_service()
        back = time.monotonic()
        new = self.provider("new")
        self.each_has_traffic(consumer, ("a", "b", "c", "new"), since=back)
        fleet["a"].stop()
        self.each_has_traffic(consumer, ("b", "c", "new"))
        new.ready()
        self.await_listed(3, 1)
        result = consumer.stop()
        self.all_answered(result)
        self.assertLess(result["max_gap_ms"], 3000)     # on a machine that does other things too
        fresh = self.consumer()
        self.each_has_traffic(fresh, ("b", "c", "new"))
        self.all_answered(fresh.stop())

    def test_nonsense_in_the_directory(self):
        fleet = self.fleet()
        consumer = self.consumer("retries=-1")
        client = self.client()
        self.each_has_traffic(consumer, "abc")
        for name in ("x", "%", "%zz%00", "crpc%3A%2F%2F", "crpc%3A%2F%2F%5B%3A%3A1", "a" * 3000,
                     "crpc%3A%2F%2F127.0.0.1%3A99999%2Ffleet.Work",
                     "crpc%3A%2F%2F127.0.0.1%2Ffleet.Work%3Fweight%3D",
                     "dubbo%3A%2F%2F127.0.0.1%3A20880%2Ffleet.Work%3Fversion%3D1.0.0",
                     "crpc%3A%2F%2F127.0.0.1%3A1%2Fother.Service", "\u00e4\u20ac"):
            client.create(self.directory + "/" + name, b"\xff\x00nonsense")
        second = self.each_has_traffic(consumer, "abc")
        self.assertEqual((second.failed, second.listed), (0, 3))
        for provider in fleet.values():
            self.assertTrue(provider.alive())
        self.all_answered(consumer.stop())

    def test_unreadable_directory(self):
        self.fleet()
        consumer = self.consumer("retries=-1")
        client = self.client()
        self.each_has_traffic(consumer, "abc")
        client.add_auth("digest", "admin:admin")
        client.set_acls(self.directory, [make_digest_acl("admin", "admin", all=True)])
        server, = self.zookeeper.servers
        server.crash()          # with a new connection the directory is read again
        server.launch()
        server.await_service()
        await_true(WHOLE_S, lambda: "cannot be read" in consumer.complaints(), "a failed read")
        second = self.each_has_traffic(consumer, "abc")
        self.assertEqual((second.failed, second.listed), (0, 3))
        client.retry(client.set_acls, self.directory, [make_acl("world", "anyone", all=True)])
        self.provider("new")    # such a directory is tried every 5 s
        self.each_has_traffic(consumer, ("a", "b", "c", "new"), WHOLE_S + 6)
        self.all_answered(consumer.stop())

    def test_empty_directory(self):
        self.fleet()
        consumer = self.consumer("retries=-1")
        client = self.client()
        self.each_has_traffic(consumer, "abc")
        # somebody cleans up by mistake
        transaction = client.transaction()
        for name in client.get_children(self.directory):
            transaction.delete(self.directory + "/" + name)
        transaction.commit()
        await_true(WHOLE_S, lambda: "the last 3 known stay in use" in consumer.complaints(), "a word")
        second = self.each_has_traffic(consumer, "abc")
        self.assertEqual((second.failed, second.listed), (0, 3))
        self.await_listed(3, WHOLE_S)       # the providers put their nodes back
        # and now the directory is not even there
        client.delete(self.directory, recursive=True)
        second = self.each_has_traffic(consumer, "abc")
        self.assertEqual(second.failed, 0)
        self.provider("new")
        self.each_has_traffic(consumer, ("a", "b", "c", "new"))
        self.await_listed(4, WHOLE_S)
        self.all_answered(consumer.stop())


class Quorum(Scenario):
    servers = 3

    def setUp(self):
        super().setUp()
        self.fleet()
        self.load = self.consumer("retries=-1")
        self.each_has_traffic(self.load, "abc")

    def new_provider_is_found(self, name, provider=None):
        begin = time.monotonic()
        provider = provider or self.provider(name)
        self.each_has_traffic(self.load, (name,), only=False, since=begin)
        self.all_answered_so_far()

    def all_answered_so_far(self):
        self.assertEqual([s.failed for s in self.load.seconds() if s.failed], [])

    def test_leader_is_lost(self):
        leader = self.zookeeper.leader()
        leader.crash()
        self.zookeeper.leader()
        self.new_provider_is_found("d")
        leader.launch()
        leader.await_service()
        leader = self.zookeeper.leader()
        leader.freeze()
        try:
            time.sleep(2 * SESSION_MS / 1000 + 2)   # sessions move to the others, or are lost
            self.new_provider_is_found("e")
        finally:
            leader.thaw()
        time.sleep(2)
        self.each_has_traffic(self.load, "abcde")
        self.all_answered(self.load.stop())

    def test_no_quorum(self):
        leader = self.zookeeper.leader()
        lost = [leader, next(s for s in self.zookeeper.servers if s is not leader)]
        for server in lost:
            server.crash()
        begin = time.monotonic()
        new = self.provider("new")
        time.sleep(NO_QUORUM_S)
        self.assertTrue(new.alive())
        for second in self.load.seconds():
            if second.when > begin:
                self.assertEqual((set(second.by), second.failed), (set("abc"), 0))
        for server in lost:
            server.launch()
        for server in lost:
            server.await_service()
        self.new_provider_is_found("new", new)
        self.each_has_traffic(self.load, ("a", "b", "c", "new"))
        self.await_listed(4, 2)
        self.all_answered(self.load.stop())


# --- providers that fail --------------------------------------------------------------------------

class Policy(Scenario):
    def slow_one(self, options):
        fleet = self.fleet("--delay-ms", 0, names="ac")
        slow = self.provider("slow", "--delay-ms", 2000).ready()
        slow.signal(signal.SIGUSR1)         # fast at first
        self.await_listed(3)
        consumer = self.consumer("timeout_ms=500&" + options, rate=500)
        before = self.each_has_traffic(consumer, ("a", "c", "slow"))
        slow.signal(signal.SIGUSR1)
        limit = 10 * before.p99_ms + 50
        # within two seconds begins one that is good: that one, and what it takes until it is told
        second = consumer.await_second(3.2, lambda s: s.p99_ms < limit and s.failed <= 5 and
                                       s.ok > 450, "the p99 recovers")
        self.assertLess(second.by.get("slow", 0), 20)
        slow.signal(signal.SIGUSR1)
        consumer.await_second(15, lambda s: s.by.get("slow", 0) > 50, "it gets traffic again")
        result = consumer.stop()
        self.assertEqual(set(result["by_code"]) - {"ETIMEDOUT"}, set(), result)
        self.assertLess(result["failed"], 500)
        self.assertEqual(result["duplicates"], 0)
        self.assertTrue(all(p.alive() for p in fleet.values()))

    def test_slow_provider_and_least_active(self):
        self.slow_one("lb=la")

    def test_slow_provider_and_breaker(self):
        # the longer the window, the longer a good past outweighs the failures
        self.slow_one("breaker=1&breaker_window_ms=1000")

    def test_retry_budget(self):
        """Providers that read a request and close: every call fails, and repeating each of them
        would triple the load on what is broken already."""
        closing = [Closing() for _ in range(3)]
        for peer in closing:
            self.addCleanup(peer.close)
        consumer = self.consumer(
            url="list://%s?retries=2&timeout_ms=1000" % ",".join(p.address for p in closing),
            rate=100, seconds=4, method="Get")
        self.assertIsNotNone(consumer.child.wait(30))
        consumer.reader.join(5)
        result = json.loads(consumer.lines[-1][1])
        self.assertEqual((result["ok"], result["failed"]), (0, 400))
        # ten tokens at first, and no success that gives one back
        self.assertLessEqual(result["attempts"], 400 + 12)
        self.assertGreater(result["attempts"], 400)
        requests = sum(peer.requests for peer in closing)
        self.assertLessEqual(requests, 400 + 12)
        self.assertGreater(requests, 0)

    def test_overload(self):
        """Five times as many calls as it can serve: those that it takes are as fast as ever, the
        others hear of it at once."""
        provider, = self.fleet("--delay-ms", 50, "--max-concurrency", 10, names="a").values()
        result = self.consumer("retries=-1", rate=1000, seconds=3).result()
        self.assertEqual(result["by_code"], {"ELIMIT": result["failed"]})
        self.assertTrue(400 < result["ok"] <= 620, result)    # ten at a time, 50 ms each: 200/s
        self.assertEqual((result["ok"] + result["failed"], result["unsent"]), (3000, 0), result)
        self.assertLess(result["p99_us"], 150000)
        self.assertEqual(provider.stop(), (result["ok"], 0))   # what is refused is not executed

    def test_errors_of_the_application_are_not_repeated(self):
        fleet = self.fleet("--fail-percent", 50)
        consumer = self.consumer("retries=2", rate=500, seconds=2, method="Get")
        result = consumer.result()
        self.assertEqual(result["by_code"], {"EAPP": result["failed"]})
        self.assertTrue(300 < result["failed"] < 700, result)
        self.assertEqual(result["attempts"], result["sent"])
        self.assertEqual(sum(p.stop()[0] for p in fleet.values()), result["sent"])


class Closing:
    """A peer that takes a request and closes the connection."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        self.requests = 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self.requests += connection.recv(65536).count(b"PRPC")
                except OSError:
                    pass

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


# --- with somebody else's eyes --------------------------------------------------------------------

class Layout(Scenario):
    """What Dubbo's documents say about the registry, as an independent client sees it."""

    def read_url(self, client, category):
        names = client.get_children("%s/%s/%s" % (self.root, SERVICE, category))
        return [urllib.parse.urlsplit(urllib.parse.unquote_plus(name)) for name in names]

    def test_what_is_written(self):
        provider = self.provider("a", "--weight", 50, "--group", "g 1", "--version", "1.0.0")
        provider.ready()
        client = self.await_listed(1)
        self.consumer("group=g%201&version=1.0.0")
        url, = self.read_url(client, "providers")
        options = dict(urllib.parse.parse_qsl(url.query, strict_parsing=True))
        self.assertEqual((url.netloc, url.path), (provider.address, "/" + SERVICE))
        for key, value in {"interface": SERVICE, "group": "g 1", "version": "1.0.0", "side":
                           "provider", "weight": "50", "methods": "Do,Get", "application":
                           "fleet_provider"}.items():
            self.assertEqual(options.get(key), value, options)
        self.assertAlmostEqual(int(options["timestamp"]) / 1000, time.time(), delta=60)
        name, = client.get_children(self.directory)
        self.assertNotEqual(client.get(self.directory + "/" + name)[1].ephemeralOwner, 0)
        await_true(5, lambda: client.exists("%s/%s/consumers" % (self.root, SERVICE)) and
                   self.read_url(client, "consumers"), "the consumer is listed")
        url, = self.read_url(client, "consumers")
        options = dict(urllib.parse.parse_qsl(url.query, strict_parsing=True))
        self.assertEqual((url.scheme, url.path), ("consumer", "/" + SERVICE))
        self.assertEqual(options.get("side"), "consumer")

    def test_what_others_write(self):
        fleet = self.fleet(names="ab")
        alone = self.provider("alone", registry="none").ready()
        consumer = self.consumer("retries=-1")
        client = self.client()
        self.each_has_traffic(consumer, "ab")
        name = urllib.parse.quote("crpc://%s/%s?application=other&interface=%s&side=provider"
                                  % (alone.address, SERVICE, SERVICE), safe="")
        client.create(self.directory + "/" + name, b"", ephemeral=True)
        self.each_has_traffic(consumer, ("a", "b", "alone"))
        rule = "%s/%s/configurators/" % (self.root, SERVICE) + urllib.parse.quote(
            "override://%s/%s?category=configurators&dynamic=false&enabled=true&disabled=true"
            % (fleet["a"].address, SERVICE), safe="")
        client.create(rule, b"", makepath=True)
        self.each_has_traffic(consumer, ("b", "alone"))
        client.delete(rule)
        self.each_has_traffic(consumer, ("a", "b", "alone"))
        self.all_answered(consumer.stop())


# --- running --------------------------------------------------------------------------------------

def main():
    logging.disable(logging.CRITICAL)       # kazoo's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _build.programs(PROGRAMS, ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
                               "-fno-omit-frame-pointer"],
                    "examples/fleet/fleet_provider.c", "examples/fleet/fleet_consumer.c",
                    proto="fleet", zookeeper=True)
    suite = unittest.TestSuite()
    wildcard = os.environ.get("CRPC_TEST_FILTER") or "*"
    for tests in unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]):
        chosen = [test for test in tests
                  if fnmatch.fnmatch(test.id().replace("__main__.", ""), wildcard) and (
                      len(sys.argv) == 1 or any(word in test.id() for word in sys.argv[1:]))]
        suite.addTest(unittest.TestSuite(chosen))
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    for test, why in result.skipped:
        print("skipped: %s: %s" % (test.id(), why))
    failed = len(result.failures) + len(result.errors)
    passed = result.testsRun - len(result.skipped) - failed
    print("%d passed, %d failed" % (max(0, passed), failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
