"""Real ZooKeeper servers for scripts: one, or several that vote. Needs Debian's zookeeper package."""
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time

JAVA = ["java", "-Xmx64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp",
        "/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar",
        "org.apache.zookeeper.server.quorum.QuorumPeerMain"]
PR_SET_PDEATHSIG = 1
C = ctypes.CDLL(None)


def die_with_parent():
    """For subprocess' preexec_fn: what a script starts never outlives it."""
    C.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_ports(count):
    """Ports that nobody listens on, outside the range from which outgoing connections take theirs:
    so that a server that is down for a while gets its port again."""
    found = []
    while len(found) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Server:
    """One server, with a directory and a port of its own."""
    host = "127.0.0.1"
    tick_ms = 200
    prefix = ()     # of the command that starts it

    def __init__(self, directory, port, more="", number=None):
        self.directory, self.port, self.more, self.number = directory, port, more, number
        self.process = None
        self.write_files()

    def write_files(self):
        os.makedirs(os.path.join(self.directory, "data"), exist_ok=True)
        if self.number:
            with open(os.path.join(self.directory, "data", "myid"), "w") as f:
                f.write("%d\n" % self.number)
        with open(os.path.join(self.directory, "zoo.cfg"), "w") as f:
            f.write("tickTime=%d\ndataDir=%s/data\nclientPort=%d\nclientPortAddress=%s\n"
                    "admin.enableServer=false\n4lw.commands.whitelist=*\nminSessionTimeout=400\n"
                    "maxSessionTimeout=60000\nmaxClientCnxns=0\n%s"
                    % (self.tick_ms, self.directory, self.port, self.host, self.more))

    def launch(self):
        with open(os.path.join(self.directory, "log"), "ab") as log:
            command = [*self.prefix, *JAVA, os.path.join(self.directory, "zoo.cfg")]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, preexec_fn=die_with_parent)

    def mode(self):
        """standalone, leader or follower; None if it does not serve."""
        try:
            with socket.create_connection((self.host, self.port), 1) as s:
                s.settimeout(1)
                s.sendall(b"srvr")
                answer = b""
                while True:
                    piece = s.recv(4096)
                    if not piece:
                        break
                    answer += piece
        except OSError:
            return None
        for line in answer.decode().splitlines():
            if line.startswith("Mode: "):
                return line.split()[1]
        return None

    def await_service(self, seconds=30):
        end = time.monotonic() + seconds
        while not self.mode():
            if time.monotonic() > end or self.process.poll() is not None:
                with open(os.path.join(self.directory, "log"), errors="replace") as log:
                    raise AssertionError("ZooKeeper does not serve: " + log.read()[-2000:])
            time.sleep(0.02)

    def crash(self):
        """As with a power cut; the data stay."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def wipe(self):
        shutil.rmtree(os.path.join(self.directory, "data"))
        self.write_files()


class Ensemble:
    """`count` servers; one of them stands alone, three can lose one. A context manager."""

    def __init__(self, count=1):
        self.directory = tempfile.mkdtemp(prefix="crpc-zookeeper.")
        ports = free_ports(3 * count)
        more = ""
        if count > 1:
            more = "initLimit=25\nsyncLimit=5\n" + "".join(
                "server.%d=127.0.0.1:%d:%d\n" % (i + 1, ports[count + i], ports[2 * count + i])
                for i in range(count))
        self.servers = [Server(os.path.join(self.directory, str(i + 1)), ports[i], more,
                               i + 1 if count > 1 else None) for i in range(count)]
        self.hosts = ",".join("127.0.0.1:%d" % s.port for s in self.servers)

    def __enter__(self):
        try:
            for server in self.servers:
                server.launch()
            for server in self.servers:
                server.await_service()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.crash()
        shutil.rmtree(self.directory, ignore_errors=True)

    def leader(self):
        """Waits until there is one."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            for server in self.servers:
                if server.process and server.mode() == "leader":
                    return server
            time.sleep(0.02)
        raise AssertionError("no server leads")
