#!/usr/bin/python3
"""The attackers, and the sink beside which they are measured.

    attackers.py ATTACK HOST:PORT|PATH [LOOPS]     attacks what listens there, until it is killed
    attackers.py sink PATH                         listens on a TCP port, which it prints, and on PATH;
                                                   accepts everybody, reads everything, is silent

LOOPS: how many loops of the server share its connections, 1 by default.

An attacker prints "ready" once it holds what it wants to hold. Its connections come from 127.0.0.2
and the addresses behind it, because a server's accounts are by address and the honest client's is
127.0.0.1. It never waits for its victim: all sockets are non-blocking.

An attack is a class below, named as on the command line: its docstring says what it tries, `setup`
takes the first hold, and `step` is called again and again. A connection that the server closes is
opened anew.
"""
import errno
import os
import selectors
import socket
import struct
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..",
                                "crpc_impl_tests", "system"))
import wire     # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
RESET = struct.pack("ii", 1, 0)     # SO_LINGER: close() sends a reset
BIND_NO_PORT = 24                   # IP_BIND_ADDRESS_NO_PORT


def echo(message, cid=1, **more):
    return wire.request(message, cid, **more)


class Peer:
    """One connection, and what is still to be sent on it."""

    def __init__(self, target, address, receive_buffer=0):
        tcp = isinstance(target, tuple)
        self.socket = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self.socket.setblocking(False)
        self.unsent = memoryview(b"")
        self.open = True
        try:
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if tcp:
                self.socket.setsockopt(socket.IPPROTO_IP, BIND_NO_PORT, 1)
                self.socket.bind((address, 0))
            self.open = self.socket.connect_ex(target) in (0, errno.EINPROGRESS)
        except OSError:
            self.open = False

    def send(self, data=b""):
        """Sends what fits of what is left and of `data`, and keeps the rest for the next call."""
        if data:
            self.unsent = memoryview(bytes(self.unsent) + data if self.unsent else data)
        try:
            while self.open and self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent):]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            # a connection that is not complete yet
            self.open = self.open and error.errno in (errno.ENOTCONN, errno.EAGAIN)

    def drop_input(self, most=MIB):
        """Reads and forgets up to `most` bytes; notices the end of the connection."""
        try:
            while self.open and most > 0:
                piece = len(self.socket.recv(256 * KIB))
                self.open, most = piece > 0, most - piece
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.open = error.errno == errno.ENOTCONN

    def ended(self):
        """Whether the server has closed or reset, without reading what it sent."""
        try:
            self.open = self.open and len(self.socket.recv(1, socket.MSG_PEEK)) > 0
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.open = error.errno == errno.ENOTCONN
        return not self.open

    def close(self, reset=False):
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()


# --- kinds of attacks -----------------------------------------------------------------------------

class Attack:
    """What attack.py must know of an attack."""
    over = "tcp"            # the listener that it uses, or unix
    addresses = 1           # from which it comes
    receive_buffer = 0
    stderr_pipe = False     # the server's stderr is a pipe that nobody reads
    honest = ()             # further arguments of crpc_press
    stop_s = None           # how long a stop may take at most; None: drain_ms and 1.2 s

    def __init__(self, target, loops=1):
        self.target = target
        self.loops = loops  # of the server: accepted connections go to one after the other
        self.opened = 0

    def connect(self):
        self.opened += 1
        return Peer(self.target, "127.0.0.%d" % (2 + self.opened % self.addresses),
                    self.receive_buffer)

    def setup(self):
        self.peers = []

    def step(self):
        time.sleep(0.05)

    def settle(self):
        """Goes on until everything is sent, for 0.3 s at least and for a second at most."""
        began = time.monotonic()
        while time.monotonic() - began < (1 if any(p.unsent for p in self.peers) else 0.3):
            self.step()


class Holder(Attack):
    """Opens `count` connections, sends on each what `first` says, and reads nothing."""
    count = 100

    def first(self, number):
        return b""

    def hold(self, number):
        peer = self.connect()
        peer.send(self.first(number))
        return peer

    def setup(self):
        self.peers = [self.hold(number) for number in range(self.count)]

    def step(self):
        for number, peer in enumerate(self.peers):
            peer.send()
            if peer.ended():
                peer.close()
                self.peers[number] = self.hold(number)
        time.sleep(0.05)


class Flooder(Attack):
    """Sends the same block on `count` connections as fast as they take it, and drops the replies."""
    count = 1
    pause = 0               # seconds between two blocks; 0: as fast as possible

    def block(self):
        raise NotImplementedError

    def setup(self):
        self.data = self.block()
        self.peers = [self.connect() for _ in range(self.count)]
        self.step()

    def step(self):
        for number, peer in enumerate(self.peers):
            peer.drop_input()
            peer.send(b"" if peer.unsent else self.data)
            if not peer.open:
                peer.close()
                self.peers[number] = self.connect()
        time.sleep(self.pause or 0.0005 * all(peer.unsent for peer in self.peers))


# --- memory ---------------------------------------------------------------------------------------

class announce(Holder):
    """bodies of together 256 MiB are announced to each loop, 48 KiB of each sent, and no more"""
    each = 30               # 3 of 64 MiB, then each of half as much, down to 64 KiB

    def setup(self):
        self.count = self.each * self.loops
        super().setup()

    def first(self, number):
        number //= self.loops
        meta = wire.target() + wire.number(4, 1)
        size = max(64 * KIB, 64 * MIB >> max(0, number - 2))
        return b"PRPC" + struct.pack(">II", size, len(meta)) + meta + b"x" * (48 * KIB)


class uploads(Holder):
    """64 bodies of 4 MiB, together max_bytes, are sent to each loop, but for their last byte"""
    each = 64
    honest = ("--attachment", "70k")    # which needs such memory, too

    def setup(self):
        meta = wire.target() + wire.number(4, 1)
        size = len(meta) + 4 * MIB
        self.data = b"PRPC" + struct.pack(">II", size, len(meta)) + meta + b"x" * (4 * MIB - 1)
        self.count = self.each * self.loops
        super().setup()

    def first(self, number):
        return self.data


class drop(Attack):
    """replies of nine sizes, 16 KiB to 4 MiB, are asked for, and the connections closed unread"""
    receive_buffer = 4 * KIB
    turn = 0

    def step(self):
        size = 16 * KIB << self.turn % 9
        each = 6 * MIB // size     # more than the kernel's buffers and max_queued hold
        self.peers = [self.connect() for _ in range(64)]
        for peer in self.peers:
            peer.send(echo(b"reply %d" % size) * each)
        time.sleep(0.1)
        for peer in self.peers:
            peer.close()
        self.turn += 1


class deaf(Holder):
    """500 peers ask for 6 replies of 64 KiB each and never read"""
    count = 500
    each = 6
    receive_buffer = 4 * KIB

    def first(self, number):
        return echo(b"reply %d" % (64 * KIB)) * self.each


class polls(Holder):
    """4,000 long polls of 51 bytes; between two of them 60 KiB of requests that are refused"""
    count = 8
    each = 500

    def setup(self):
        super().setup()
        between = echo(b"x" * (30 * KIB), service=b"scan.Service") * 2
        for cid in range(self.each):
            for peer in self.peers:
                peer.drop_input()
                peer.send(echo(b"park", cid) + between)

    def step(self):
        for peer in self.peers:
            peer.drop_input()
            peer.send()
        time.sleep(0.001 if any(peer.unsent for peer in self.peers) else 0.05)


class metas(Flooder):
    """two connections send metas of 60 MiB that hold user_fields"""
    count = 2

    def block(self):
        field = wire.entry(b"k", b"v")
        return wire.frame(wire.target() + wire.number(4, 1) + field * (60 * MIB // len(field)))


# --- peers that talk nonsense, or nothing ---------------------------------------------------------

class garbage(Attack):
    """curl, a TLS scanner and noise at the port; the server's stderr is a pipe that nobody reads"""
    stderr_pipe = True
    words = (b"GET / HTTP/1.1\r\nHost: example\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n",
             bytes.fromhex("16030100c8010000c40303") + bytes(range(200)), b"SSH-2.0-scan\r\n",
             b"PRPC" + b"\xff" * 60, bytes(range(255, 0, -1)))

    def step(self):
        peers = [self.connect() for _ in range(20)]
        for number, peer in enumerate(peers):
            peer.send(self.words[number % len(self.words)])
        time.sleep(0.002)
        for peer in peers:
            peer.close()


class silent(Holder):
    """1,100 connections from four addresses that never send a byte"""
    count = 1100
    addresses = 4


class resets(Attack):
    """connects from 200 addresses, sends a request and resets, as fast as it can"""
    addresses = 200

    def step(self):
        for _ in range(20):
            peer = self.connect()
            peer.send(echo(b"gone"))
            peer.close(reset=True)


class deaf_unix(deaf):
    """400 peers of the unix socket ask for 16 replies of 64 KiB each and never read"""
    over = "unix"
    count = 400
    each = 16


class half(Holder):
    """100 connections send 5 bytes of a request and wait; then the server is told to stop"""
    stop_s = 2

    def first(self, number):
        return b"PRPC\0"


class unknown(Flooder):
    """calls of 1,000 services that do not exist, pipelined"""

    def block(self):
        return b"".join(echo(b"x", cid, service=b"scan.Service%d" % cid) for cid in range(1000))


# --- shares ---------------------------------------------------------------------------------------

class pipeline(Flooder):
    """one connection pipelines requests as fast as it can, for the worker queue"""

    def block(self):
        return b"".join(echo(b"mine", cid) for cid in range(2000))


class deferred(Flooder):
    """two connections to each loop ask for more long polls than max_concurrency, and go on"""

    def block(self):
        return b"".join(echo(b"park", cid) for cid in range(100))

    def setup(self):
        """Asks at a rate that workers can follow, or worker_queue refuses most of it."""
        self.pause = 0.005
        self.count = 2 * self.loops
        super().setup()
        for _ in range(60):
            self.step()
        self.pause = 0.05


class hot_key(deferred):
    """one ordering key, whose first request is a long poll, for all places where requests wait"""
    honest = ("--user-field", "crpc-key=honest")

    def block(self):
        key = wire.entry(b"crpc-key", b"hot")
        return b"".join(echo(b"park", cid, more=key) for cid in range(100))


ATTACKS = {attack.__name__: attack for attack in (
    announce, uploads, drop, deaf, polls, metas, garbage, silent, resets, deaf_unix, half, unknown,
    pipeline, deferred, hot_key)}


# --- the sink -------------------------------------------------------------------------------------

def sink(path):
    ready = selectors.DefaultSelector()
    tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    unix.bind(path)
    for listener in (tcp, unix):
        listener.setblocking(False)
        listener.listen(1024)
        ready.register(listener, selectors.EVENT_READ, "listener")
    print(tcp.getsockname()[1], flush=True)
    while True:
        for key, _ in ready.select():
            try:
                if key.data == "listener":
                    peer, _ = key.fileobj.accept()
                    peer.setblocking(False)
                    ready.register(peer, selectors.EVENT_READ)
                    continue
                open_ = len(key.fileobj.recv(256 * KIB)) > 0
            except BlockingIOError:
                continue
            except OSError:
                open_ = False
            if key.data != "listener" and not open_:
                ready.unregister(key.fileobj)
                key.fileobj.close()


def main():
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in (*ATTACKS, "sink"):
        sys.exit(__doc__ + "\nAttacks: " + " ".join(ATTACKS))
    if sys.argv[1] == "sink":
        sink(sys.argv[2])
    host, _, port = sys.argv[2].rpartition(":")
    attack = ATTACKS[sys.argv[1]]((host, int(port)) if host else sys.argv[2],
                                  *map(int, sys.argv[3:]))
    attack.setup()
    attack.settle()
    print("ready", flush=True)
    while True:
        attack.step()


if __name__ == "__main__":
    main()
