#!/usr/bin/python3
"""baidu_std, byte for byte, over real sockets: raw clients against echo_server, scripted servers
against echo_client. Shares no code with crpc: it has an encoder and a decoder of its own.

    wire.py [NAME...]      only the tests whose name contains one of these

Needs what `make examples` builds. echo_server and echo_client are built once more, with ASan and
UBSan, and most tests run on those; memory is measured on the plain ones. A server is told to stop
after every class of tests: it has to exit with 0, without a leak and without a complaint of a
sanitizer. The last line is "N passed, N failed".

crpc-test-timeout: 240
"""
import fnmatch
import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import _build

PLAIN = os.path.join(_build.BUILD, "examples")
CHECKED = os.path.join(_build.BUILD, "wire")
SEED = int(os.environ.get("CRPC_TEST_SEED", "1"))
WAIT = 10.0     # seconds, of anything that should happen at once
MIB = 1 << 20

SERVICE = b"example.EchoService"
GOLDEN_REQUEST = bytes.fromhex(
    "505250430000002800000021"
    "0a1b0a136578616d706c652e4563686f5365727669636512044563686f18002001"
    "0a0568656c6c6f")
GOLDEN_REPLY = bytes.fromhex("505250430000000f00000008" "1202080018002001" "0a0568656c6c6f")


# --- protobuf and frames, by hand -----------------------------------------------------------------

def varint(number):
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def number(field, value):
    return varint(field << 3) + varint(value)


def text(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


def entry(key, value):
    """One user_fields entry."""
    return text(9, text(1, key) + text(2, value))


def read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at


def decode(data):
    """{field: [values]}: numbers as signed 64 bits, everything else as bytes."""
    out, at = {}, 0
    while at < len(data):
        key, at = read_varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = read_varint(data, at)
            value = value - (1 << 64) if value >> 63 else value
        elif kind == 2:
            size, at = read_varint(data, at)
            value, at = data[at:at + size], at + size
            if len(value) != size:
                raise ValueError("a field is cut off")
        else:
            raise ValueError("wire type %d" % kind)
        out.setdefault(key >> 3, []).append(value)
    return out


def frame(meta, body=b"", attachment=b""):
    return (b"PRPC" + struct.pack(">II", len(meta) + len(body) + len(attachment), len(meta)) +
            meta + body + attachment)


def message(value):
    """EchoRequest and EchoResponse look alike."""
    return text(1, value)


def target(service=SERVICE, method=b"Echo", more=b""):
    return text(1, text(1, service) + text(2, method) + more)


def request(value=b"hello", cid=1, attachment=b"", more=b"", **names):
    """A request as crpc's own client sends it, `more` fields of the meta behind."""
    meta = target(**names) + number(3, 0)
    if cid is not None:
        meta += number(4, cid)
    if attachment:
        meta += number(5, len(attachment))
    return frame(meta + more, message(value), attachment)


class Reply:
    def __init__(self, raw):
        size, meta_size = struct.unpack(">II", raw[4:12])
        self.raw = raw
        self.meta = decode(raw[12:12 + meta_size])
        self.response = decode(self.meta[2][0]) if 2 in self.meta else {}
        self.cid = self.meta.get(4, [None])[0]
        self.code = self.response.get(1, [None])[0]
        self.error = self.response.get(2, [b""])[0].decode()
        rest = raw[12 + meta_size:]
        attached = self.meta.get(5, [0])[0]
        self.payload = rest[:len(rest) - attached]
        self.attachment = rest[len(rest) - attached:]
        self.text = decode(self.payload).get(1, [None])[0] if self.payload else None


# --- echo_server and clients of it ----------------------------------------------------------------

def environment():
    env = dict(os.environ)
    env.setdefault("ASAN_OPTIONS", "detect_leaks=1:detect_stack_use_after_return=1")
    env.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
    return env


class Server:
    """echo_server as a process."""

    def __init__(self, *urls, programs=CHECKED):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([os.path.join(programs, "echo_server"), *urls],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=self.log, env=environment())
        self.pid = self.process.pid
        said = b""
        while said.count(b"\n") < len(urls):
            ready, _, _ = select.select([self.process.stdout], [], [], WAIT)
            piece = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            said += piece
            if not piece:
                self.process.kill()
                self.process.wait()
                raise AssertionError("echo_server said %r; %s" % (said, self.complaints()))
        self.urls = [line.split("listening on ")[1] for line in said.decode().splitlines()]
        self.url = self.urls[0]

    def complaints(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def signal(self, signo):
        self.process.send_signal(signo)

    def memory(self, what="VmRSS"):
        with open("/proc/%d/status" % self.pid) as status:
            for line in status:
                if line.startswith(what + ":"):
                    return int(line.split()[1]) * 1024
        raise AssertionError("no %s" % what)

    def alive(self):
        return self.process.poll() is None

    def stop(self, seconds=WAIT):
        """Asks it to end; returns its exit status."""
        if self.alive():
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = "did not end within %g s" % seconds
        self.process.stdout.close()
        output = self.complaints()
        self.log.close()
        if "anitizer" in output or "runtime error" in output:
            print(output, file=sys.stderr)
            return "complained: a sanitizer"
        return status


class Client:
    """A raw connection."""

    def __init__(self, url, buffer=None):
        scheme, where = url.split("://")
        if scheme == "unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(WAIT)
            self.socket.connect(where)
        else:
            host, port = where.rsplit(":", 1)
            self.socket = socket.socket(socket.AF_INET6 if host[0] == "[" else socket.AF_INET)
            if buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            self.socket.settimeout(WAIT)
            self.socket.connect((host.strip("[]"), int(port)))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def exactly(self, size):
        data = bytearray()
        while len(data) < size:
            piece = self.socket.recv(min(size - len(data), MIB))
            if not piece:
                raise EOFError("%d of %d bytes, then the end" % (len(data), size))
            data += piece
        return bytes(data)

    def reply(self):
        head = self.exactly(12)
        if head[:4] != b"PRPC":
            raise AssertionError("a reply begins with %r" % head)
        return Reply(head + self.exactly(struct.unpack(">I", head[4:8])[0]))

    def request(self):
        head = self.exactly(12)
        return Request(head + self.exactly(struct.unpack(">I", head[4:8])[0]))

    def ask(self, data):
        self.send(data)
        return self.reply()

    def half_close(self):
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def ended(self):
        """What still comes, up to the end of the connection (which may be a reset)."""
        data = b""
        try:
            while True:
                piece = self.socket.recv(MIB)
                if not piece:
                    return data
                data += piece
        except ConnectionResetError:
            return data


class WithServer(unittest.TestCase):
    """One echo_server for all tests of a class; afterwards it has to end well."""
    urls = ("tcp://127.0.0.1:0",)
    programs = CHECKED

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.urls, programs=cls.programs)

    @classmethod
    def tearDownClass(cls):
        status = cls.server.stop()
        if status != 0:
            raise AssertionError("echo_server ended with %s" % status)

    def tearDown(self):
        self.assertTrue(self.server.alive(), "echo_server died")

    def connect(self, **options):
        client = Client(self.server.url, **options)
        self.addCleanup(client.socket.close)
        return client

    def check_alive(self, client=None):
        client = client or self.connect()
        self.assertEqual(client.ask(GOLDEN_REQUEST).raw, GOLDEN_REPLY)

    def check_closed(self, data, client=None):
        """The server closes after this, says nothing, and goes on serving others."""
        client = client or self.connect()
        client.send(data)
        self.assertEqual(client.ended(), b"")
        self.check_alive()

    def check_refused(self, data, code, *words):
        """An error reply that names what is wrong; the connection goes on."""
        client = self.connect()
        reply = client.ask(data)
        self.assertEqual((reply.code, reply.payload, reply.attachment), (code, b"", b""),
                         reply.error)
        for word in words:
            self.assertIn(word, reply.error)
        self.check_alive(client)
        return reply


# --- requests of our own shape --------------------------------------------------------------------

class Bytes(WithServer):
    def test_golden(self):
        self.check_alive()

    def test_only_the_promised_fields_come_back(self):
        reply = self.connect().ask(request(cid=77, attachment=b"abc"))
        self.assertEqual(reply.meta, {2: [b"\x08\x00"], 3: [0], 4: [77], 5: [3]})

    def test_split_at_every_byte(self):
        parts = [request(b"one", 1), request(b"two", 2, b"behind"), request(b"", 3)]
        stream = b"".join(parts)
        client = self.connect()
        wanted = None
        for cut in range(len(stream) + 1):
            client.send(stream[:cut])
            time.sleep(0.001)
            client.send(stream[cut:])
            replies = b"".join(client.reply().raw for _ in parts)
            wanted = wanted or replies
            self.assertEqual(replies, wanted, "split at %d" % cut)
        self.assertEqual([Reply(wanted[:25]).text, Reply(wanted[:25]).cid], [b"one", 1])

    def test_one_byte_at_a_time(self):
        client = self.connect()
        for byte in request(b"slow", 5, b"attached"):
            client.send(bytes([byte]))
            time.sleep(0.0005)
        reply = client.reply()
        self.assertEqual((reply.text, reply.attachment, reply.cid), (b"slow", b"attached", 5))

    def test_pipelining(self):
        rng = random.Random(SEED)
        ids = [0, -1, 1, -(1 << 63), (1 << 63) - 1, None, 1 << 32, -(1 << 32), 127, 128]
        ids += rng.sample(range(1 << 40, 1 << 62), 190)
        rng.shuffle(ids)
        client = self.connect()
        client.send(b"".join(request(b"%d" % i, cid) for i, cid in enumerate(ids)))
        got = {}
        for _ in ids:
            reply = client.reply()
            self.assertEqual(reply.code, 0)
            self.assertNotIn(int(reply.text), got)
            got[int(reply.text)] = reply.cid
        self.assertEqual(got, {i: cid or 0 for i, cid in enumerate(ids)})

    def test_pipelining_over_many_reads(self):
        count, client = 5000, self.connect()
        sender = threading.Thread(target=client.send, args=(
            b"".join(request(b"x" * (i % 300), i) for i in range(count)),))
        sender.start()
        got = [client.reply() for _ in range(count)]
        sender.join(WAIT)
        self.assertEqual([(r.cid, len(r.text)) for r in got],
                         [(i, i % 300) for i in range(count)])

    def test_attachments(self):
        client = self.connect()
        for size in (0, 1, 64 << 10, 3 * MIB):
            data = random.Random(size).randbytes(size)
            reply = client.ask(request(b"with %d" % size, size, data))
            self.assertEqual((reply.code, reply.text), (0, b"with %d" % size))
            self.assertTrue(reply.attachment == data, "%d bytes came back wrong" % size)

    def test_attachment_without_a_size_of_zero(self):
        reply = self.connect().ask(request(more=number(5, 0)))
        self.assertEqual(reply.raw, GOLDEN_REPLY)

    def test_long_texts(self):
        client = self.connect()
        for size in (126, 127, 128, 16383, 16384, 65535, 65536, 3 * MIB):
            data = random.Random(size).randbytes(size)
            self.assertTrue(client.ask(request(data, size)).text == data, "%d bytes" % size)

    def test_a_text_is_bytes(self):
        data = bytes(range(256)) + b"\xff\xfe\0"
        self.assertEqual(self.connect().ask(request(data)).text, data)


# --- metas of other shapes ------------------------------------------------------------------------

class Metas(WithServer):
    def check_served(self, meta, cid=1, body=None, attachment=b""):
        client = self.connect()
        reply = client.ask(frame(meta, message(b"hello") if body is None else body, attachment))
        self.assertEqual((reply.code, reply.text, reply.cid, reply.attachment),
                         (0, b"hello", cid, attachment), reply.error)
        # what starlight cannot do without, and nothing that peers use otherwise
        self.assertIn(1, reply.response)
        self.assertEqual(set(reply.meta) - {5}, {2, 3, 4})
        self.assertEqual(reply.meta[3], [0])
        self.check_alive(client)

    def test_as_brpc_sends(self):
        self.check_served(target(more=number(3, 1234)) + number(3, 0) + number(4, 1) +
                          number(10, 0) + number(11, 0) + text(12, b""))

    def test_as_brpc_sends_with_everything(self):
        spans = number(3, -5) + number(4, 1) + number(5, 2) + number(6, 3)
        self.check_served(
            target(more=spans + text(7, b"0af7651916cd43dd") + number(8, 60000)) + number(3, 0) +
            number(4, -9) + number(5, 3) + text(7, b"secret") + entry(b"key", b"value") +
            entry(b"", b"") + number(10, 0) + number(11, 0) + text(12, b"") + number(13, 0), -9,
            attachment=b"abc")

    def test_as_srpc_sends(self):
        self.check_served(target() + number(3, 0), 0)
        self.check_served(target(more=number(3, 7)) + number(3, 0) + number(5, 3), 0,
                          attachment=b"xyz")

    def test_as_jprotobuf_sends(self):
        extra = text(7, text(1, b"k") + text(2, b"v")) * 2 + text(110, b"p") + text(111, b"trace")
        self.check_served(target(b"EchoService", more=number(3, 1) + extra) + number(3, 0) +
                          number(4, 2) + number(5, 0) + text(7, b""), 2)

    def test_as_starlight_sends(self):
        self.check_served(target(more=number(3, 0) + text(1000, text(1, b"x"))) + number(3, 0) +
                          number(4, 3) + number(5, 0), 3)

    def test_as_go_sends(self):
        self.check_served(target() + number(4, 4), 4)       # proto3: no zero is sent
        self.check_served(target(more=text(7, text(1, b"k") + text(2, b"v")) + text(110, b"")) +
                          number(4, 5), 5)

    def test_unknown_fields_are_skipped(self):
        every = (number(14, 1 << 63) + text(100, b"hulu") + text(101, b"sofa") +
                 number(536870911, 1) + varint(200 << 3 | 1) + bytes(8) + varint(201 << 3 | 5) +
                 bytes(4))
        self.check_served(every + target(more=every) + every + number(4, 6) + every, 6)

    def test_unknown_fields_of_the_message_are_skipped(self):
        self.check_served(target() + number(4, 1), 1,
                          text(2, b"new") + message(b"hello") + number(15, 3))

    def test_fields_in_any_order(self):
        self.check_served(number(5, 2) + number(4, 9) + number(3, 0) + text(1, text(
            2, b"Echo") + number(8, 500) + text(1, SERVICE)), 9, attachment=b"ab")

    def test_fields_given_twice(self):
        self.check_served(target(b"Nonsense") + target() + number(4, 1) + number(4, 2), 2)

    def test_numbers_longer_than_needed(self):
        self.check_served(target() + b"\x20\x81\x80\x00", 1)
        self.check_served(target() + b"\xa0\x80\x00\x07", 7)

    def test_a_large_meta(self):
        self.check_served(target() + number(4, 1) +
                          b"".join(entry(b"%d" % i, b"v" * 100) for i in range(500)))

    def test_a_meta_over_64_kib(self):
        meta = target() + number(4, 1) + entry(b"key", b"v" * 65536)
        self.check_closed(frame(meta, message(b"hello")))
        self.check_alive()

    def test_names(self):
        client = self.connect()
        for service, method, code in (
                (b"EchoService", b"Echo", 0), (SERVICE, b"Echo", 0),
                # brpc's rule: an unknown name with a dot is an unknown method
                (b"Nobody", b"Echo", 1001), (b"example.Nobody", b"Echo", 1002),
                (b"other.EchoService", b"Echo", 1002), (b".EchoService", b"Echo", 1002),
                (b"EchoServic", b"Echo", 1001), (b"EchoService2", b"Echo", 1001),
                (b"echoservice", b"Echo", 1001), (SERVICE, b"echo", 1002), (SERVICE, b"", 1002),
                (b"EchoService", b"Echo2", 1002), (b"", b"", 1001),
                (b"EchoService\0", b"Echo", 1001),
                (b"x" * 5000, b"Echo", 1001), (SERVICE, b"y" * 5000, 1002),
                (b"%s%n%100000d", b"%s", 1001)):
            reply = client.ask(request(cid=8, service=service, method=method))
            self.assertEqual((reply.code, reply.cid), (code, 8), (service, method))
            if code:
                self.assertEqual(reply.payload, b"")
                self.assertTrue(reply.error)

    def test_no_request_in_the_meta(self):
        self.check_refused(frame(b""), 1001)
        self.check_refused(frame(number(3, 0) + number(4, 3)), 1001)

    def test_the_error_reply_of_the_golden_vector(self):
        reply = self.check_refused(request(method=b"Nothing", cid=1), 1002, "Nothing",
                                   "EchoService")
        self.assertEqual(reply.meta, {2: [number(1, 1002) + text(2, reply.error.encode())],
                                      3: [0], 4: [1]})


# --- what is refused by name ----------------------------------------------------------------------

class Refusals(WithServer):
    def test_messages_that_do_not_decode(self):
        for body in (b"", text(2, b"other"), b"\x0a\x05hell", b"\x0a", b"\xff", number(1, 5),
                     b"\x0a\xff\xff\xff\xff\x0f", b"\x07", b"\x00"):
            reply = self.check_refused(frame(target() + number(3, 0) + number(4, 5), body), 1003,
                                       "Echo")
            self.assertEqual(reply.cid, 5)

    def test_compression(self):
        for kind in (1, 2, 3, 4, 99, -1):
            meta = target() + number(3, kind) + number(4, 6)
            self.check_refused(frame(meta, b"\x1f\x8b\x08"), 1003, "compress_type %d" % kind)

    def test_checksums(self):
        meta = target() + number(4, 1) + number(11, 1) + text(12, b"\1\2\3\4")
        self.check_refused(frame(meta, message(b"x")), 1003, "checksum_type 1")

    def test_content_types(self):
        for kind in (1, 2, 3, 77):
            self.check_refused(frame(target() + number(4, 1) + number(10, kind), b'{"message":""}'),
                               1003, "content_type %d" % kind)

    def test_streams(self):
        for settings in (number(1, 5) + number(2, 1), b""):
            self.check_refused(frame(target() + number(4, 1) + text(8, settings), message(b"x")),
                               1003, "stream")

    def test_chunks(self):
        for info in (number(1, 1) + number(2, 0), b""):
            self.check_refused(frame(target() + number(4, 1) + text(6, info), message(b"x")), 1003,
                               "chunk")

    def test_attachment_sizes(self):
        for size in (8, 9, 1 << 20, (1 << 31) - 1, -1, -(1 << 31)):
            reply = self.check_refused(frame(target() + number(4, 7) + number(5, size),
                                             message(b"hello")), 1003, "attachment_size %d" % size,
                                       "7 bytes")
            self.assertEqual(reply.cid, 7)

    def test_an_attachment_in_place_of_the_message(self):
        self.check_refused(frame(target() + number(4, 7) + number(5, 7), message(b"hello")), 1003)

    def test_oversize(self):
        size = 64 * MIB + 1
        client = self.connect()
        meta = target() + number(3, 0) + number(4, 12)
        client.send(b"PRPC" + struct.pack(">II", size, len(meta)) + meta)
        reply = client.reply()      # before the rest has come
        self.assertEqual((reply.code, reply.cid, reply.payload), (1003, 12, b""))
        self.assertIn(str(size), reply.error)
        self.assertIn(str(64 * MIB), reply.error)
        left = size - len(meta)
        zeros = bytes(MIB)
        while left:
            client.send(zeros[:min(left, MIB)])
            left -= min(left, MIB)
        self.check_alive(client)
        # once more, with the next request right behind
        client.send(b"PRPC" + struct.pack(">II", size, len(meta)) + meta)
        for _ in range(63):
            client.send(zeros)
        client.send(bytes(size - len(meta) - 63 * MIB) + GOLDEN_REQUEST)
        self.assertEqual(client.reply().code, 1003)
        self.assertEqual(client.reply().raw, GOLDEN_REPLY)

    def test_far_oversize_is_closed(self):
        meta = target() + number(4, 1)
        for size in (256 * MIB + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
            self.check_closed(b"PRPC" + struct.pack(">II", size, len(meta)) + meta)
        for meta_size in (64 * MIB + 1, (1 << 32) - 1):
            self.check_closed(b"PRPC" + struct.pack(">II", (1 << 32) - 1, meta_size) + bytes(100))


# --- what is no baidu_std -------------------------------------------------------------------------

class Hostile(WithServer):
    def test_wrong_magic(self):
        for data in (b"X", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRP\0" + bytes(8),
                     b"prpc" + bytes(8),
                     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0", b"STRM" + bytes(8),
                     b"\x16\x03\x01\x02\x00\x01\x00"):
            self.check_closed(data)

    def test_garbage_behind_a_request(self):
        client = self.connect()
        self.check_alive(client)
        self.check_closed(b"garbage", client)

    def test_meta_larger_than_body(self):
        for size, meta_size in ((0, 1), (10, 11), (10, (1 << 32) - 1), ((1 << 31) - 1, 1 << 31)):
            self.check_closed(b"PRPC" + struct.pack(">II", size, meta_size) + bytes(100))

    def test_metas_that_do_not_decode(self):
        good = target() + number(3, 0) + number(4, 1)
        for meta in (b"\xff", b"\x0a", b"\x0a\x7f", good[:-1], good + b"\x0f", good + b"\x00\x01",
                     good + b"\x20" + b"\xff" * 10 + b"\x01", good + b"\x7a\xff\xff\xff\xff\x0f",
                     text(1, b"\x0a\x50x"), text(1, text(1, SERVICE)), text(1, text(2, b"Echo")),
                     good + text(2, b"\x08"), b"\x0a" + b"\xff" * 9 + b"\x7f" + good,
                     good + b"\x0c"):
            self.check_closed(frame(meta, message(b"x")))

    def test_random_damage(self):
        rng = random.Random(SEED)
        seeds = [GOLDEN_REQUEST, request(b"abc", -1, b"attached"),
                 request(more=entry(b"k", b"v") + number(10, 0) + text(7, b"x"))]
        for _ in range(400):
            data = bytearray(b"".join(rng.choices(seeds, k=3)))
            for _ in range(rng.randint(1, 6)):
                at = rng.randrange(len(data))
                kind = rng.randrange(4)
                if kind == 0:
                    data[at] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    data[at] = rng.choice((0, 1, 127, 128, 255))
                elif kind == 2:
                    del data[at:at + rng.randint(1, 8)]
                else:
                    data[at:at] = rng.randbytes(rng.randint(1, 8))
                data = data or bytearray(b"P")
            with Client(self.server.url) as client:
                try:
                    client.send(bytes(data))
                    client.half_close()
                    client.ended()
                except OSError:
                    pass    # closed while it was being sent
        self.check_alive()

    def test_reset_at_any_moment(self):
        stream = request(b"x" * 3000, 1, b"y" * 3000) * 3
        for i in range(60):
            client = Client(self.server.url)
            client.send(stream[:i * 157])
            if i % 3:
                time.sleep(0.001)
            client.reset()
        self.check_alive()

    def test_500_connections(self):
        clients = [self.connect() for _ in range(500)]
        for i, client in enumerate(clients):
            client.send(request(b"%d" % i, i))
        for i, client in enumerate(clients):
            reply = client.reply()
            self.assertEqual((reply.cid, reply.text), (i, b"%d" % i))
        for client in clients[::2]:
            client.reset()
        self.check_alive(clients[1])


class Endings(WithServer):
    def test_half_close(self):
        for count in (0, 1, 3, 1000):
            client = self.connect()
            client.send(b"".join(request(b"%d" % i, i) for i in range(count)))
            client.half_close()
            self.assertEqual([client.reply().cid for _ in range(count)], list(range(count)))
            self.assertEqual(client.ended(), b"")

    def test_half_close_with_refused_requests(self):
        client = self.connect()
        client.send(request(service=b"Nobody") * 1000)
        client.half_close()
        self.assertEqual({client.reply().code for _ in range(1000)}, {1001})
        self.assertEqual(client.ended(), b"")

    def test_half_close_in_a_frame(self):
        for cut in (1, 11, 12, 30, 51):
            client = self.connect()
            client.send(GOLDEN_REQUEST + GOLDEN_REQUEST[:cut])
            client.half_close()
            self.assertEqual(client.ended(), GOLDEN_REPLY)

    def test_half_close_before_large_replies_are_read(self):
        client = self.connect(buffer=64 << 10)
        data = bytes(3 * MIB)
        for i in range(3):
            client.send(request(b"big", i, data))
        client.half_close()
        time.sleep(0.2)
        for i in range(3):
            reply = client.reply()
            self.assertEqual((reply.cid, len(reply.attachment)), (i, len(data)))
        self.assertEqual(client.ended(), b"")

    def test_a_late_request_is_not_executed(self):
        # Behind a message whose copying takes longer than 1 ms, in the same read.
        big = request(bytes(24 * MIB), 1)
        late = frame(target(more=number(8, 1)) + number(3, 0) + number(4, 2), message(b"late"))
        patient = frame(target(more=number(8, 60000)) + number(3, 0) + number(4, 3),
                        message(b"patient"))
        client = self.connect()
        client.send(big[:-1000])
        time.sleep(0.3)
        self.server.signal(signal.SIGSTOP)
        try:
            client.send(big[-1000:] + late + patient)
        finally:
            self.server.signal(signal.SIGCONT)
        self.assertEqual(client.reply().code, 0)
        reply = client.reply()
        self.assertEqual((reply.cid, reply.code, reply.payload), (2, 1008, b""), reply.error)
        reply = client.reply()
        self.assertEqual((reply.cid, reply.code), (3, 0))

    def test_a_timeout_that_is_none(self):
        client = self.connect()
        for ms in (0, -1, (1 << 31) - 1, -(1 << 31)):
            meta = target(more=number(8, ms)) + number(4, 1)
            self.assertEqual(client.ask(frame(meta, message(b"x"))).code, 0)

    def test_echo_client_gives_up_on_a_stopped_server(self):
        self.server.signal(signal.SIGSTOP)
        try:
            for ms in ("1", "50"):
                run = echo_client(self.server.url, "hello", "--timeout-ms", ms)
                self.assertEqual(run.returncode, 1)
                self.assertIn("ETIMEDOUT (1008)", run.stderr)
                self.assertIn("(local)", run.stderr)
                self.assertIn(self.server.url[6:], run.stderr)
        finally:
            self.server.signal(signal.SIGCONT)
        self.assertEqual(echo_client(self.server.url, "hello").stdout, "hello\n")


class Slow(WithServer):
    def test_connections_that_never_finish_a_frame(self):
        """They cost others nothing, and are closed at frame_timeout_ms (30 s)."""
        begin = time.monotonic()
        clients = [self.connect() for _ in range(200)]
        stream = request(b"x" * 100)
        for i, client in enumerate(clients):
            client.send(stream[:1 + i % 60])
        idle = self.connect()
        worst = 0
        for _ in range(200):
            sent = time.monotonic()
            self.check_alive()
            worst = max(worst, time.monotonic() - sent)
        self.assertLess(worst, 3)
        for i in range(1, 28):      # a trickle is no excuse
            clients[0].send(stream[i:i + 1])
            time.sleep(max(0, begin + i - time.monotonic()))
        for client in clients:
            self.assertEqual(client.ended(), b"")
        self.assertGreater(time.monotonic() - begin, 29)
        self.assertLess(time.monotonic() - begin, 45)
        self.check_alive(idle)      # has begun nothing, and stays


class Listeners(unittest.TestCase):
    def test_all_kinds_at_once(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "echo.sock")
            urls = ["tcp://127.0.0.1:0", "unix://" + path, "tcp://127.0.0.1:0"]
            try:
                with socket.socket(socket.AF_INET6) as probe:
                    probe.bind(("::1", 0))
                urls.append("tcp://[::1]:0")
            except OSError:
                print("note: this machine has no IPv6 loopback")
            server = Server(*urls)
            try:
                self.assertEqual(len(set(server.urls)), len(urls))
                self.assertEqual(server.urls[1], urls[1])
                for url in server.urls:
                    with Client(url) as client:
                        self.assertEqual(client.ask(GOLDEN_REQUEST).raw, GOLDEN_REPLY, url)
                        reply = client.ask(request(b"x", 5, bytes(MIB)))
                        self.assertEqual(len(reply.attachment), MIB)
                    run = echo_client(url, "to " + url, "--attachment", "more")
                    self.assertEqual((run.stdout, run.stderr),
                                     ("to %s\nattachment: more\n" % url, ""))
            finally:
                self.assertEqual(server.stop(), 0)
            self.assertFalse(os.path.exists(path))

    def test_stale_and_busy_unix_sockets(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "echo.sock")
            first = Server("unix://" + path)
            first.process.kill()
            first.stop()
            self.assertTrue(os.path.exists(path))
            second = Server("unix://" + path)       # a socket that nobody serves is taken over
            try:
                run = start("echo_server", "unix://" + path)
                self.assertEqual(run.returncode, 1)
                self.assertIn("EADDRESS", run.stderr)
                with Client(second.url) as client:
                    self.assertEqual(client.ask(GOLDEN_REQUEST).raw, GOLDEN_REPLY)
            finally:
                self.assertEqual(second.stop(), 0)

    def test_a_port_that_is_taken(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            url = "tcp://127.0.0.1:%d" % other.getsockname()[1]
            run = start("echo_server", "tcp://127.0.0.1:0", url)
            self.assertEqual(run.returncode, 1)
            self.assertEqual(run.stdout, "")
            self.assertIn(url, run.stderr)
            self.assertIn("in use", run.stderr)

    def test_urls_that_are_none(self):
        for url in ("tcp://127.0.0.1", "tcp://127.0.0.1:99999", "127.0.0.1:1", "http://127.0.0.1:1",
                    "tcp://", "unix://", "tcp://[::1:1", "tcp://127.0.0.1:0?x=1", "",
                    "unix:///" + "x" * 200, "tcp://256.0.0.1.invalid.:1"):
            run = start("echo_server", url)
            self.assertEqual(run.returncode, 1, url)
            self.assertIn("echo_server: ", run.stderr)
            self.assertNotIn("anitizer", run.stderr)
        self.assertEqual(start("echo_server").returncode, 2)


class Stopping(unittest.TestCase):
    def setUp(self):
        self.server = Server("tcp://127.0.0.1:0")
        self.addCleanup(self.server.stop)

    def test_idle(self):
        with Client(self.server.url) as client:
            self.assertEqual(client.ask(GOLDEN_REQUEST).code, 0)
            begin = time.monotonic()
            self.server.signal(signal.SIGTERM)
            self.assertEqual(client.ended(), b"")
            self.assertEqual(self.server.process.wait(WAIT), 0)
            self.assertLess(time.monotonic() - begin, 3)
        with self.assertRaises(ConnectionRefusedError):
            Client(self.server.url)

    def test_interrupt(self):
        self.server.signal(signal.SIGINT)
        self.assertEqual(self.server.process.wait(WAIT), 0)

    def test_replies_under_way_arrive(self):
        with Client(self.server.url, buffer=64 << 10) as client:
            for i in range(2):
                client.send(request(b"big", i, bytes(3 * MIB)))
            time.sleep(0.3)
            self.server.signal(signal.SIGTERM)
            time.sleep(0.3)
            for i in range(2):
                reply = client.reply()
                self.assertEqual((reply.cid, reply.code, len(reply.attachment)), (i, 0, 3 * MIB))
            self.assertEqual(client.ended(), b"")
        self.assertEqual(self.server.process.wait(WAIT), 0)

    def test_requests_under_way_are_answered(self):
        """Sent before the signal, found behind it: each is served or told that the server stops."""
        for count, size in ((50, 1), (2000, 1), (20, 60000)):
            server = Server("tcp://127.0.0.1:0")
            self.addCleanup(server.stop)
            with Client(server.url) as client:
                self.assertEqual(client.ask(GOLDEN_REQUEST).code, 0)
                server.signal(signal.SIGSTOP)
                client.send(b"".join(request(bytes(size), i) for i in range(count)))
                server.signal(signal.SIGTERM)
                server.signal(signal.SIGCONT)
                for i in range(count):
                    reply = client.reply()
                    self.assertEqual(reply.cid, i)
                    self.assertIn(reply.code, (0, 2003))
                self.assertEqual(client.ended(), b"")
            self.assertEqual(server.process.wait(WAIT), 0)

    def test_new_requests_are_told(self):
        """While one connection is drained, another one's request gets ELOGOFF."""
        with Client(self.server.url, buffer=64 << 10) as slow, Client(self.server.url) as other:
            self.assertEqual(other.ask(GOLDEN_REQUEST).code, 0)
            slow.send(request(b"big", 1, bytes(12 * MIB)))
            time.sleep(0.3)
            self.server.signal(signal.SIGTERM)
            reply = other.ask(request(cid=9))
            while reply.code == 0:      # the signal is not handled yet
                reply = other.ask(request(cid=9))
            self.assertEqual((reply.cid, reply.code), (9, 2003), reply.error)
            self.assertEqual(len(slow.reply().attachment), 12 * MIB)
            self.assertEqual((slow.ended(), other.ended()), (b"", b""))
        self.assertEqual(self.server.process.wait(WAIT), 0)

    def test_a_peer_that_never_reads_delays_it_for_drain_ms(self):
        with Client(self.server.url, buffer=64 << 10) as client:
            client.send(request(b"big", 1, bytes(12 * MIB)))
            time.sleep(0.3)
            begin = time.monotonic()
            self.server.signal(signal.SIGTERM)
            self.assertEqual(self.server.process.wait(WAIT), 0)
            self.assertLess(time.monotonic() - begin, 8)


class Memory(WithServer):
    """Clients that send and never read. On the plain build, whose memory is its own."""
    programs = PLAIN
    total = 200 * MIB
    allowed = 24 * MIB      # beyond what it had: the queue's limit, buffers, the allocator's slack

    def flood(self, data, connections=1):
        """Sends `data` again and again until 200 MB went out, or nothing goes any more."""
        with Client(self.server.url) as client:
            client.ask(request(b"warm", 1, bytes(MIB)))
        before = self.server.memory()
        clients = [self.connect() for _ in range(connections)]
        block = data * max(1, MIB // len(data))
        at = {c.socket: 0 for c in clients}
        sent = peak = 0
        for c in clients:
            c.socket.setblocking(False)
        while sent < self.total:
            _, ready, _ = select.select([], list(at), [], 0.7)
            if not ready:
                break
            for s in ready:
                try:
                    n = s.send(memoryview(block)[at[s]:])
                except BlockingIOError:
                    continue
                at[s] = (at[s] + n) % len(block)
                sent += n
            peak = max(peak, self.server.memory())
        peak = max(peak, self.server.memory())
        self.assertLess(peak - before, self.allowed * connections, "%d MiB for %d MiB sent" % (
            (peak - before) // MIB, sent // MIB))
        self.check_alive()      # on a connection of its own
        return clients, sent

    def test_small_requests(self):
        clients, sent = self.flood(GOLDEN_REQUEST)
        # and when it reads at last, nothing is missing
        clients[0].socket.settimeout(WAIT)
        whole = sent // len(GOLDEN_REQUEST)
        got = 0
        while got < whole * len(GOLDEN_REPLY):
            piece = clients[0].socket.recv(MIB)
            self.assertTrue(piece, "closed after %d replies of %d" % (got // 27, whole))
            got += len(piece)

    def test_large_messages(self):
        self.flood(request(bytes(60000)))

    def test_attachments(self):
        self.flood(request(b"x", 1, bytes(MIB)))
        self.flood(request(b"x", 1, b"1"))

    def test_refused_requests(self):
        self.flood(request(service=b"Nobody" * 20))
        self.flood(frame(target() + number(3, 1), message(b"x")))

    def test_requests_that_do_not_decode(self):
        self.flood(frame(target() + number(4, 1)))

    def test_four_at_once(self):
        self.flood(GOLDEN_REQUEST, 4)

    def test_frames_announced_and_not_sent(self):
        before = self.server.memory()
        clients = [self.connect() for _ in range(300)]
        head = b"PRPC" + struct.pack(">II", 60 * MIB, 30 * MIB)
        for client in clients:
            client.send(head + bytes(1000))
        time.sleep(0.3)
        self.assertLess(self.server.memory() - before, 24 * MIB)
        for client in clients:
            client.reset()
        self.check_alive()


# --- echo_client and servers that say what a test wants -------------------------------------------

def start(program, *arguments, seconds=WAIT):
    return subprocess.run([os.path.join(CHECKED, program), *arguments], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=seconds,
                          env=environment(), encoding="utf-8", errors="replace", check=False)


def echo_client(url, what, *more):
    return start("echo_client", url, what, *more)


class Request(Reply):
    """What echo_client sent: the same frame with `request` in the meta."""

    def __init__(self, raw):
        super().__init__(raw)
        self.target = decode(self.meta[1][0])


def reply(cid, value=b"hello", response=number(1, 0), before=b"", more=b"", attachment=b"",
          compress=number(3, 0)):
    """A success as crpc's server sends it; the arguments change it."""
    meta = before + (text(2, response) if response is not None else b"") + compress + number(4, cid)
    if attachment:
        meta += number(5, len(attachment))
    return frame(meta + more, message(value), attachment)


class Scripted(unittest.TestCase):
    """A server of one connection at a time, in a thread; `script` gets connection and request."""

    def setUp(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(50)
        self.listener.settimeout(WAIT)
        self.addCleanup(self.listener.close)
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        self.request = None

    def serve(self, script):
        client = Client.__new__(Client)
        client.socket, _ = self.listener.accept()
        with client:
            client.socket.settimeout(WAIT)
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.request = client.request()
            try:
                script(client, self.request)
            except (BrokenPipeError, ConnectionResetError):
                pass    # it had what it wanted

    def run_client(self, script, *options, what="hello", query=""):
        server = threading.Thread(target=self.serve, args=(script,))
        server.start()
        run = echo_client("tcp://" + self.address + query, what, *options)
        server.join(WAIT)
        self.assertFalse(server.is_alive(), "echo_client sent no request")
        self.assertNotIn("anitizer", run.stderr)
        return run

    def check_success(self, script, *options, wanted="hello\n", **more):
        run = self.run_client(script, *options, **more)
        self.assertEqual((run.stdout, run.stderr, run.returncode), (wanted, "", 0))

    def check_failure(self, script, name, *words, side="(remote)", options=(), **more):
        run = self.run_client(script, *options, **more)
        self.assertEqual((run.returncode, run.stdout), (1, ""), run.stderr)
        self.assertIn("echo_client: " + name, run.stderr)
        for word in (*words, side, self.address, "example.EchoService.Echo"):
            self.assertIn(word, run.stderr)
        return run

    # --- requests

    def test_the_request_has_the_promised_fields_only(self):
        self.check_success(lambda c, r: c.send(reply(r.cid)), "--timeout-ms", "4000")
        meta = dict(self.request.meta)
        # zeros are sent, 5 only with an attachment; the first frame of a connection names crpc
        self.assertEqual(set(meta), {1, 3, 4, 9})
        self.assertEqual(len(meta[9]), 1)
        self.assertIn(b"crpc-peer", meta[9][0])
        self.assertEqual(meta[3], [0])
        self.assertNotEqual(meta[4], [0])
        wanted = dict(self.request.target)
        ms = wanted.pop(8)[0]
        self.assertEqual(wanted, {1: [SERVICE], 2: [b"Echo"]})
        self.assertTrue(3000 < ms <= 4000, ms)
        self.assertEqual(self.request.payload, message(b"hello"))

    def test_the_request_with_everything(self):
        self.check_success(lambda c, r: c.send(reply(r.cid)), "--log-id", "-5", "--attachment",
                           "more bytes")
        self.assertEqual(set(self.request.meta), {1, 3, 4, 5, 9})
        self.assertEqual(set(self.request.target), {1, 2, 3, 8})
        self.assertEqual(self.request.target[3], [-5])
        self.assertEqual(self.request.attachment, b"more bytes")
        self.assertTrue(0 < self.request.target[8][0] <= 1000)

    def test_the_short_name_if_asked_for(self):
        self.check_success(lambda c, r: c.send(reply(r.cid)), query="?short_names=1")
        self.assertEqual(self.request.target[1], [b"EchoService"])

    # --- replies of all shapes

    def test_as_crpc_replies(self):
        self.check_success(lambda c, r: c.send(reply(r.cid)))

    def test_as_brpc_replies(self):
        self.check_success(lambda c, r: c.send(reply(
            r.cid, more=number(10, 0) + number(11, 0) + text(12, b""))))

    def test_as_jprotobuf_replies(self):
        self.check_success(lambda c, r: c.send(reply(
            r.cid, before=text(1, r.meta[1][0]), more=number(5, 0))))

    def test_as_pbrpc_replies(self):
        self.check_success(lambda c, r: c.send(reply(
            r.cid, before=text(1, r.meta[1][0]), response=b"", compress=b"")))

    def test_as_srpc_replies(self):
        self.check_success(lambda c, r: c.send(reply(r.cid, response=None)))
        self.check_success(lambda c, r: c.send(reply(r.cid, response=None, compress=b"")))

    def test_as_starlight_replies(self):
        self.check_success(lambda c, r: c.send(reply(
            r.cid, response=number(1, 0) + text(1000, text(1, b"k")))))

    def test_unknown_fields(self):
        new = (text(100, b"x") + number(101, 5) + varint(300 << 3 | 5) + bytes(4) +
               varint(301 << 3 | 1) + bytes(8))
        self.check_success(lambda c, r: c.send(reply(
            r.cid, before=new, response=new + number(1, 0) + new, more=new + entry(b"k", b"v"))))

    def test_an_attachment(self):
        self.check_success(lambda c, r: c.send(reply(r.cid, attachment=b"behind")),
                           wanted="hello\nattachment: behind\n")

    def test_a_long_reply(self):
        self.check_success(lambda c, r: c.send(reply(r.cid, b"x" * 3 * MIB)),
                           wanted="x" * 3 * MIB + "\n")

    def test_split_at_every_byte(self):
        size = len(reply(1 << 32, attachment=b"behind"))
        for cut in range(0, size, 1):
            def script(c, r):
                data = reply(r.cid, attachment=b"behind")
                c.send(data[:cut])
                time.sleep(0.002)
                c.send(data[cut:])
            self.check_success(script, wanted="hello\nattachment: behind\n")

    def test_one_byte_at_a_time(self):
        def script(c, r):
            for byte in reply(r.cid):
                c.send(bytes([byte]))
                time.sleep(0.001)
        self.check_success(script)

    # --- replies to somebody else

    def test_forged_replies_complete_nothing(self):
        def script(c, r):
            for cid in (0, -1, r.cid + 1, r.cid - 1, r.cid ^ 1 << 32, r.cid ^ 1 << 63, -r.cid,
                        r.cid & 0xffffffff ^ 1, 1 << 62):
                cid = cid - (1 << 64) if cid >> 63 > 0 else cid
                if cid != r.cid:
                    c.send(reply(cid, b"forged"))
                    c.send(reply(cid, b"forged", response=number(1, 500) + text(2, b"forged")))
            c.send(frame(text(2, number(1, 0)), message(b"forged")))
            c.send(reply(r.cid))
        self.check_success(script)

    def test_a_second_reply_is_dropped(self):
        self.check_success(lambda c, r: c.send(reply(r.cid) + reply(r.cid, b"again") * 3))

    def test_late_replies_complete_nothing(self):
        for poller in ("epoll", "poll"):
            def script(c, first):
                second = c.request()        # it has given up on the first
                c.send(reply(first.cid, b"call 0") * 2 + reply(second.cid, b"call 1"))
                third = c.request()
                c.send(reply(second.cid, b"call 1") + reply(first.cid, b"call 0") +
                       reply(third.cid, b"call 2"))
                self.assertEqual(len({first.cid, second.cid, third.cid}), 3)
            server = threading.Thread(target=self.serve, args=(script,))
            server.start()
            run = start("depth1", "client", poller, "tcp://" + self.address, "3", "300")
            server.join(WAIT)
            self.assertEqual(run.stdout, "2 ok, 1 failed, 4 late replies, poller %s\n" % poller,
                             run.stderr)

    def test_only_forged_replies(self):
        def script(c, r):
            c.send(reply(r.cid + 1))
            c.ended()
        self.check_failure(script, "ETIMEDOUT (1008)", side="(local)",
                           options=("--timeout-ms", "200"))

    # --- errors

    def test_codes(self):
        for code, name in ((500, "EAPP (3116), the service's own code 500"), (112, "E? (112)"),
                           (2003, "ELOGOFF (2003)"), (1008, "ETIMEDOUT (1008)"),
                           (-1, "EAPP (3116), the service's own code -1"),
                           (10001, "EAPP (3116), the service's own code 10001"),
                           (1001, "ENOSERVICE (1001)"), (1002, "ENOMETHOD (1002)"),
                           (1004, "EAUTH (1004)"), (2001, "EINTERNAL (2001)"),
                           (2004, "ELIMIT (2004)"), (3999, "E? (3999)"), (-(1 << 31), "EAPP")):
            for words in (b"because", b""):
                self.check_failure(lambda c, r: c.send(frame(
                    text(2, number(1, code) + (text(2, words) if words else b"")) + number(3, 0) +
                    number(4, r.cid))), name, words.decode())

    def test_an_error_with_the_old_payload(self):
        for more in (b"", number(3, 2)):
            self.check_failure(lambda c, r: c.send(reply(
                r.cid, b"must not be shown", response=number(1, 500) + text(2, b"why"),
                before=text(1, r.meta[1][0]), attachment=b"nor this", more=more)), "EAPP", "why")
        # not even if its sizes make no sense
        self.check_failure(lambda c, r: c.send(frame(
            text(2, number(1, 1004)) + number(4, r.cid) + number(5, 5000))), "EAUTH")

    def test_an_endless_error_text(self):
        run = self.check_failure(lambda c, r: c.send(frame(
            text(2, number(1, 500) + text(2, b"%n" * 30000)) + number(4, r.cid))), "EAPP", side="")
        self.assertLess(len(run.stderr), 1000)

    def test_replies_that_make_no_sense(self):
        for what, word in (
                (lambda r: reply(r.cid, compress=number(3, 1)), "compress"),
                (lambda r: reply(r.cid, more=number(5, 5000)), "attachment_size"),
                (lambda r: reply(r.cid, more=number(5, -1)), "attachment_size"),
                (lambda r: frame(number(4, r.cid)), "reply"),   # a required field is missing
                (lambda r: frame(number(4, r.cid), b"\x0a\x05hell"), "reply")):
            self.check_failure(lambda c, r: c.send(what(r)), "ERESPONSE (2002)", word,
                               side="(local)")

    def test_an_oversize_reply(self):
        self.check_failure(lambda c, r: c.send(reply(r.cid, bytes(2000))), "ERESPONSE (2002)",
                           "over max_body, 1000", side="(local)", query="?max_body=1000")

    def test_what_is_no_reply(self):
        for data in (b"HTTP/1.1 400 Bad Request\r\n\r\n", frame(b"\xff"),
                     b"PRPC" + struct.pack(">II", 5, 6) + bytes(20),
                     b"PRPC" + struct.pack(">II", (1 << 32) - 1, 10) + bytes(20)):
            def script(c, _):
                c.send(data)
                self.assertEqual(c.ended(), b"")
            self.check_failure(script, "", "connection", side="(local)")

    def test_the_peer_closes(self):
        size = len(reply(1 << 32))
        for cut in (0, 1, 4, 11, 12, 13, size - 8, size - 7, size - 1):
            self.check_failure(lambda c, r: c.send(reply(r.cid)[:cut]), "ECONN (1009)",
                               "closed by the peer", side="(local)")

    def test_the_peer_resets(self):
        for cut in (0, 12):
            def script(c, r):
                c.send(reply(r.cid)[:cut])
                c.reset()
            self.check_failure(script, "ECONN (1009)", "connection", side="(local)")

    def test_the_peer_answers_and_closes(self):
        self.check_success(lambda c, r: (c.send(reply(r.cid)), c.half_close()))

    def test_the_peer_is_silent(self):
        for sent in (0, 5, 20):
            def script(c, r):
                c.send(reply(r.cid)[:sent])
                c.ended()
            begin = time.monotonic()
            self.check_failure(script, "ETIMEDOUT (1008)", "deadline exceeded", side="(local)",
                               options=("--timeout-ms", "300"))
            self.assertTrue(0.3 <= time.monotonic() - begin < 3)

    def test_nobody_is_there(self):
        self.listener.close()
        run = echo_client("tcp://" + self.address, "hello")
        self.assertEqual((run.returncode, run.stdout), (1, ""))
        for word in ("ECONN (1009)", "refused", self.address, "(local)"):
            self.assertIn(word, run.stderr)


# --- running --------------------------------------------------------------------------------------

def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    if not os.path.exists(os.path.join(PLAIN, "echo_server")):
        sys.exit("wire.py: no echo_server in %s: run `make examples` first" % PLAIN)
    sanitize = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
                "-fno-omit-frame-pointer"]
    _build.programs(CHECKED, sanitize, "examples/echo/echo_server.c", "examples/echo/echo_client.c",
                    "crpc_impl_tests/system/depth1.c")
    suite = unittest.TestSuite()
    wildcard = os.environ.get("CRPC_TEST_FILTER") or "*"
    for tests in unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]):
        for test in tests:
            name = test.id().replace("__main__.", "")
            if fnmatch.fnmatch(name, wildcard) and (
                    len(sys.argv) == 1 or any(word in name for word in sys.argv[1:])):
                suite.addTest(test)
    result = unittest.TextTestRunner(verbosity=2, durations=None) if sys.version_info >= (3, 12) \
        else unittest.TextTestRunner(verbosity=2)
    result = result.run(suite)
    for test, why in result.skipped:
        print("skipped: %s: %s" % (test.id(), why))
    failed = len(result.failures) + len(result.errors)
    print("%d passed, %d failed" % (result.testsRun - len(result.skipped) - min(
        failed, result.testsRun), failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
