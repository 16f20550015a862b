#!/usr/bin/python3
"""crpc_press against echo_server: what it sends, what it counts, and that a server which stands
still is charged with every call that was due meanwhile. Run by `make test`; takes two seconds.
Prints `N passed, N failed`."""
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

BUILD = os.environ.get("BUILD", "build")
PRESS = os.path.join(BUILD, "bench", "crpc_press")
SERVER = os.path.join(BUILD, "examples", "echo_server")
HISTOGRAM = os.path.join(BUILD, "bench", "hist_test")
ECHO = "example.EchoService.Echo"

results = []


def check(name, right, *details):
    results.append(bool(right))
    if not right:
        print("FAIL %s: %s" % (name, " ".join(str(d) for d in details)), flush=True)


class Server:
    """An echo_server on a socket of its own."""

    def __init__(self):
        self.dir = tempfile.TemporaryDirectory()
        self.url = "unix://%s/s" % self.dir.name
        self.process = subprocess.Popen([SERVER, self.url], stdout=subprocess.PIPE)
        self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()
        self.dir.cleanup()

    def start(self, *options, method=ECHO):
        """A press that has made its first call."""
        press = subprocess.Popen([PRESS, self.url, method, "--json", "--print", *options],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        press.first = ""
        for line in press.stderr:
            press.first += line
            if "reply of" in line or "the first call:" in line:
                break
        return press

    def press(self, *options, **more):
        return finish(self.start(*options, **more))


def finish(press):
    out, _ = press.communicate(timeout=30)
    summary = json.loads(out) if out.strip() else {}
    summary["status"] = press.returncode
    summary["first"] = press.first
    return summary


def histogram():
    done = subprocess.run([HISTOGRAM], stdout=subprocess.PIPE, text=True)
    check("histogram", done.returncode == 0, done.stdout)


def payload():
    with Server() as server, tempfile.NamedTemporaryFile() as file:
        file.write(b"\n\x03abc")
        file.flush()
        short = ("--duration", "0.05", "--warmup", "0")
        for how in [("--text-field", "1=abc"), ("--hex", "0a 03 61 62 63"), ("--payload", file.name)]:
            got = server.press(*how, *short)
            check("payload %s" % how[0], got["status"] == 0 and got["request_bytes"] == 5 and
                  "field 1, text, bytes or a message of 3 bytes: abc" in got["first"], got)
        got = server.press("--text-field", "1=x", "--int-field", "9=-1", "--attachment", "3k", *short)
        check("fields and attachment", got["status"] == 0 and got["request_bytes"] == 14 and
              got["attachment_bytes"] == 3072 and "attachment of 3072" in got["first"], got)
        ratio = got["sent_mb_per_s"] / got["received_mb_per_s"]
        check("bytes both ways", abs(ratio - (3072 + 14) / (3072 + 3)) < 0.01, got)


def user_field():
    """What the first request holds: a field of the meta, and the message behind."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        press = subprocess.Popen([PRESS, "tcp://127.0.0.1:%d" % listener.getsockname()[1], ECHO,
                                  "--user-field", "crpc-key=a=b", "--text-field", "1=abc"],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with listener.accept()[0] as peer:
            got = b""
            while b"\n\x03abc" not in got:
                piece = peer.recv(4096)
                if not piece:
                    break
                got += piece
        press.kill()
        press.wait()
    check("user field", b"\x4a\x0f\x0a\x08crpc-key\x12\x03a=b" in got and got.endswith(b"abc"), got)


def refusals():
    with Server() as server:
        got = server.press("--duration", "0.1", "--warmup", "0", method="example.EchoService.Nope")
        check("a refusal is counted by its code", got["status"] == 1 and got["ok"] == 0 and
              got["failures"].get("ENOMETHOD") == got["failed"] > 0, got)
        got = server.press("--hex", "0aff", "--duration", "0.1", "--warmup", "0")
        check("bytes that do not decode", got["failures"].get("EREQUEST", 0) > 0, got)
        url = server.url
    for line, status in [([url, ECHO], 1), ([url], 2), ([url, ECHO, "--rate", "x"], 2),
                         ([url, ECHO, "--hex", "abc"], 2), ([url, "Echo"], 2),
                         ([url, ECHO, "--text-field", "x=1"], 2), ([url, ECHO, "--user-field", "x"], 2), ([url, ECHO, "--cake", "1"], 2)]:
        done = subprocess.run([PRESS, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        check("exit status of %s" % line[1:], done.returncode == status, done)


def loops():
    with Server() as server:
        got = server.press("--text-field", "1=x", "--duration", "0.3", "--warmup", "0.1",
                           "--concurrency", "8", "--connections", "2")
        check("closed loop", got["status"] == 0 and got["ok"] == got["sent"] > 100 and
              got["failed"] == 0 and got["latency_us"]["count"] == got["ok"], got)
        got = server.press("--text-field", "1=x", "--duration", "0.3", "--warmup", "0.1",
                           "--rate", "1000")
        check("open loop", got["ok"] + got["not_sent"] in (299, 300, 301), got)
        press = server.start("--text-field", "1=x", "--duration", "60", "--warmup", "0")
        time.sleep(0.1)
        press.send_signal(signal.SIGINT)
        got = finish(press)
        check("SIGINT", got["status"] == 0 and got["ok"] > 0 and got["seconds"] < 30, got)


def stopped(*options):
    """The summary of a second in the middle of which the server stood still for half a second."""
    with Server() as server:
        press = server.start("--text-field", "1=x", "--duration", "1", "--warmup", "0", *options)
        time.sleep(0.15)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGCONT)
        return finish(press)


def stopped_open():
    """1000 calls were due, 500 of them while nobody answered: evenly 0 to 500 ms late."""
    got = stopped("--rate", "1000")
    check("stopped server, open loop", got["sent"] + got["not_sent"] in (999, 1000, 1001) and
          got["latency_us"]["count"] >= 999 and got["latency_us"]["p90"] > 250e3, got)


def stopped_one_at_a_time():
    """The same if only one call may be under way: the others were due all the same."""
    got = stopped("--rate", "1000", "--concurrency", "1")
    check("stopped server, open loop, one call at a time", got["latency_us"]["count"] >= 999 and
          got["latency_us"]["p90"] > 250e3 and got["late_us"]["p90"] > 250e3, got)


def stopped_closed():
    """Closed loop: a single slow call among very many. This is what open loop is for."""
    got = stopped("--concurrency", "1")
    check("stopped server, closed loop", got["latency_us"]["max"] > 400e3 and
          got["latency_us"]["p90"] < 100e3, got)


def stopped_for_good():
    """Calls that time out, and calls that never could be sent, are not left out."""
    with Server() as server:
        press = server.start("--text-field", "1=x", "--duration", "0.6", "--warmup", "0", "--rate",
                             "1000", "--concurrency", "10", "--timeout-ms", "200")
        server.process.send_signal(signal.SIGSTOP)
        got = finish(press)
    check("stopped for good", got["failures"].get("ETIMEDOUT", 0) >= 10 and got["not_sent"] > 300 and
          got["sent"] + got["not_sent"] in (599, 600, 601) and
          got["latency_us"]["count"] == got["sent"] + got["not_sent"] and
          got["latency_us"]["p50"] > 100e3, got)


def main():
    parts = [stopped_open, stopped_one_at_a_time, stopped_closed, stopped_for_good, loops, payload,
             user_field, refusals, histogram]
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        for part, done in [(p, pool.submit(p)) for p in parts]:
            try:
                done.result()
            except Exception as error:      # a part that breaks off is one failure
                check(part.__name__, False, repr(error))
    print("%d passed, %d failed" % (sum(results), len(results) - sum(results)))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
